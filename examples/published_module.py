"""Repairs a Lightning module that other people wrote and published, unchanged: torchgeo's ClassificationTask.

    python -m pip install torchgeo requests
    python examples/published_module.py

Two photographs (scikit-learn) are cut into patches, as scenes are cut out of a satellite's picture; the module says
which photograph a patch is of, city or flower. Then haze comes up. The module's batches are dictionaries with `image`
and `label`; a further key, `hazy`, is ours. It has new weights, nothing is downloaded.
"""

from __future__ import annotations

import warnings

import torch
from lightning.pytorch import Trainer, seed_everything
from output import start, summary
from rich import print
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nrl import RegressionFreeRepair, Target

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchgeo.trainers import ClassificationTask

SIZE = 32
Batch = dict[str, Tensor]


def patches() -> list[Batch]:
    """All patches of both photographs, in an order of chance."""
    samples = []
    for label, photograph in enumerate(load_sample_images().images):
        image = torch.tensor(photograph, dtype=torch.float32).permute(2, 0, 1) / 255
        tiles = image.unfold(1, SIZE, SIZE).unfold(2, SIZE, SIZE).flatten(1, 2).transpose(0, 1)
        samples += [{"image": tile, "label": torch.tensor(label), "hazy": torch.tensor(False)} for tile in tiles]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    return [samples[i] for i in order.tolist()]


def with_haze(samples: list[Batch]) -> list[Batch]:
    """The same, with haze over every second one."""
    hazy = [sample | {"image": 0.4 * sample["image"] + 0.6, "hazy": torch.tensor(True)} for sample in samples[::2]]
    return hazy + samples[1::2]


def is_hazy(batch: Batch) -> Tensor:
    return batch["hazy"]


if __name__ == "__main__":
    fast = start(__doc__).fast
    samples = patches()
    train, later, unseen = samples[:260], with_haze(samples[260:390]), with_haze(samples[390:])
    seed_everything(0, verbose=False)
    module = ClassificationTask(model="resnet10t", weights=None, in_channels=3, num_classes=2, lr=1e-3)
    repair = RegressionFreeRepair(
        target=Target.where(is_hazy), unseen=DataLoader(unseen, 65), max_time=3 if fast else None, verbose=False
    )
    trainer = Trainer(
        max_epochs=1 if fast else 6,
        accelerator="cpu",
        callbacks=[repair],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, 26, shuffle=True), DataLoader(later, 65))  # failures come from validation
    print(summary(repair=repair.report))
