"""Fits that a repair may come after: what the owner of the quickstart or the weak digit does before it, in variants.

`owner`: the whole training of the example. All others but the augmented ones have the seconds that it took:

- `owner, limited`: the same.
- `rate0`, `one-epoch`, `small-rate`: the network that the owner's training gave is fitted again, with a schedule that
  is over, for one epoch with the owner's schedule, or for three epochs with a small rate.
- `plain`: that network, repaired by `repair_module` from tensors.
- `no-augmentation`: the owner's training without its augmentation.

And without a limit, for images that are shifted at random:

- `augmented-step`: in `training_step`, where the owner does not do so.
- `augmented-data`: in the data set that the train loader reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from default_problems import Batch, Case
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from digits import DigitNet, SlashedZeros
from weak_digit import EPOCHS, WEAK, DigitCNN, WeakDigit, shifted

SMALL_RATE = 1e-4


def is_slashed(batch: Batch) -> Tensor:
    return batch[2]


def is_weak(batch: Batch) -> Tensor:
    return batch[1] == WEAK


class ShiftedImages(Dataset):
    """Gives each image shifted at random, another way each time that it is read."""

    def __init__(self, data: Dataset, by: int) -> None:
        self.data, self.by = data, by

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        image, *others = self.data[index]
        return (shifted(image[None], self.by)[0], *others)


class ShiftedSlashedZeros(SlashedZeros):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(ShiftedImages(self.data["train"], 1), self.batch_size, shuffle=True)


class ShiftedWeakDigit(WeakDigit):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(ShiftedImages(self.data["train"], 2), 64, shuffle=True, drop_last=True)


class ShiftingDigitNet(DigitNet):
    """The quickstart's network with an augmentation."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels, _ = batch
        return F.cross_entropy(self(shifted(images, 1)), labels)


class UnaugmentedDigitCNN(DigitCNN):
    """The weak digit's network without its augmentation."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, digits = batch
        return F.cross_entropy(self(images), digits)


def at_rate(owner: type[LightningModule], rate: float) -> type[LightningModule]:
    """The network with its own optimizer at a constant rate, without a schedule."""

    class ConstantRate(owner):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            chosen = super().configure_optimizers()
            optimizer = chosen["optimizer"] if isinstance(chosen, dict) else chosen
            for group in optimizer.param_groups:
                group["lr"] = rate
            return optimizer

    return ConstantRate


@dataclass(frozen=True)
class Fit:
    """What comes before a repair.

    Attributes:
        case: data, network and training that the weights come from; fine-tuning takes its recipe from it.
        network: what is fitted from these weights on, with the repair as a callback; None: the repair is a callback of
            the training itself.
        epochs: of that fit.
        is_limited: whether the repair has the seconds of the owner's training.
        is_plain: whether there is no fit, but `repair_module`.
    """

    case: Case
    network: Callable[[], LightningModule] | None = None
    epochs: int = 0
    is_limited: bool = True
    is_plain: bool = False


def fits_of(owner: Case, **others: Case) -> dict[str, Fit]:
    """All variants: those of the owner's training, and other trainings by name."""
    return {
        "owner": Fit(owner, is_limited=False),
        "owner, limited": Fit(owner),
        "rate0": Fit(owner, at_rate(owner.network, 0.0), owner.epochs),
        "one-epoch": Fit(owner, owner.network, 1),
        "small-rate": Fit(owner, at_rate(owner.network, SMALL_RATE), 3),
        "plain": Fit(owner, is_plain=True),
        **{name: Fit(case, is_limited=name == "no-augmentation") for name, case in others.items()},
    }


def case(data: type[LightningDataModule], network: type[LightningModule]) -> Case:
    """A training of one of the examples; both have as many epochs."""
    return Case(data, network, EPOCHS, is_slashed if issubclass(network, DigitNet) else is_weak)


FITS = {
    "quickstart": fits_of(
        case(SlashedZeros, DigitNet),
        **{
            "augmented-step": case(SlashedZeros, ShiftingDigitNet),
            "augmented-data": case(ShiftedSlashedZeros, DigitNet),
        },
    ),
    "weak digit": fits_of(
        case(WeakDigit, DigitCNN),
        **{
            "no-augmentation": case(WeakDigit, UnaugmentedDigitCNN),
            "augmented-data": case(ShiftedWeakDigit, UnaugmentedDigitCNN),
        },
    ),
}
FIT_NAMES = tuple(dict.fromkeys(name for fits in FITS.values() for name in fits))
