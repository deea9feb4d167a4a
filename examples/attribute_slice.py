"""Repairs one slice of the data, selected by an attribute: digits that lean to the right.

    python examples/attribute_slice.py

The training set of scikit-learn's digits is limited to upright writing. Later data also have digits
that lean to the right, and the network fails on four in ten of them. The slant is measured in the
image, so it is a real property of the data. Any other attribute works the same way: night, camera
2, partly occluded.
"""

from __future__ import annotations

import torch
from digits import DigitNet
from lightning.pytorch import seed_everything
from output import Splits, counts_table, quiet_trainer, start
from rich import print
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from lightning_nrl import RegressionFreeRepair, SampleOptions, Target

LEANING = 0.0  # shift to the right per pixel of height; two in five digits lean more


def slant(images: Tensor) -> Tensor:
    """Returns the slant of `n x 8 x 8` images: the shift to the right per pixel of height, `n`."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    ink = images / images.sum((1, 2), keepdim=True)
    dy = y - (ink * y).sum((1, 2), keepdim=True)
    dx = x - (ink * x).sum((1, 2), keepdim=True)
    return -(ink * dx * dy).sum((1, 2)) / (ink * dy * dy).sum((1, 2))


class Hands(Splits):
    """Batches of `(image, digit, slant)`; the training data are upright, the other splits mixed."""

    def __init__(self) -> None:
        super().__init__()
        digits = load_digits()
        order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
        whole = TensorDataset(
            images.unsqueeze(1), torch.tensor(digits.target)[order], slant(images)
        )
        train, later, test = torch.arange(len(order)).split([900, 400, 497])
        train = train[whole.tensors[2][train] <= LEANING]
        rows = {"train": train, "repair": later, "test": test}
        self.data = {split: Subset(whole, own.tolist()) for split, own in rows.items()}


def leaning(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Marks the samples of a batch that lean. Only failures among them are repaired."""
    return batch[2] > LEANING


def hand(batch: tuple[Tensor, Tensor, Tensor]) -> list[str]:
    """Names the slice of each sample. The report has separate counts for each slice."""
    return ["leaning" if leans else "upright" for leans in leaning(batch).tolist()]


if __name__ == "__main__":
    fast = start(__doc__).fast
    seed_everything(0, verbose=False)
    repair = RegressionFreeRepair(
        target=Target.where(leaning),
        samples=SampleOptions(slices=hand),
        unseen="test",
        max_time=3 if fast else None,
        verbose=False,
    )
    quiet_trainer(6 if fast else 15, repair).fit(DigitNet(), datamodule=Hands())
    print(counts_table({f"{one.name}, {one.role}": one for one in repair.report.slices}))
