"""Tasks other than one class a sample, on real data: each with a network that a Trainer can train
in a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from digit_models import digits
from lightning_package import LightningDataModule, LightningModule
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl.tasks import (
    Custom,
    Multilabel,
    Ordinal,
    Regression,
    Segmentation,
    Sequence,
    Task,
)

Pair = tuple[Tensor, Tensor]
SIZES = (160, 90, 80)
"""Samples of the training, the repair and the unseen data."""


class Data(LightningDataModule):
    """Batches of `(x, y)`. `weak` changes inputs; it does so rarely in training and often
    afterwards.
    """

    def __init__(
        self, x: Tensor, y: Tensor, weak: Callable[[Tensor], Tensor], collate: Any = None
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        share = torch.cat(
            [torch.full((n,), p) for n, p in zip(SIZES, (0.0, 0.6, 0.6), strict=True)]
        )
        chosen = torch.rand(len(share), generator=generator) < share
        x, y = x[: len(share)].clone(), y[: len(share)]
        x[chosen] = weak(x[chosen])
        self.collate = collate
        parts = zip(x.split(SIZES), y.split(SIZES), strict=True)
        self.train, self.repair, self.test = (TensorDataset(*part) for part in parts)

    def _loader(self, data: TensorDataset, shuffle: bool = False) -> DataLoader:
        return DataLoader(data, 32, shuffle=shuffle, collate_fn=self.collate)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, shuffle=True)

    def repair_dataloader(self) -> DataLoader:
        return self._loader(self.repair)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test)


class Net(LightningModule):
    """Any network with any loss of a mini-batch."""

    def __init__(
        self, network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], lr: float = 0.01
    ) -> None:
        super().__init__()
        self.network, self.mean_loss, self.lr = network, loss, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return self.mean_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Pair, batch_idx: int) -> None:
        self.log("val_loss", self.mean_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Tokens(nn.Module):
    """Digits in a row, `n x 8 x 8T`, to `n x T x 10`."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(2, (-1, 8)).transpose(1, 2).flatten(2)
        return self.head(F.relu(self.mix(tokens)))


def rows_of_digits(length: int) -> Pair:
    """`n x 8 x 8 length` images and `n x length` labels."""
    images, labels = digits()
    n = len(images) // length * length
    strips = images[:n, 0].unflatten(0, (-1, length)).transpose(1, 2).flatten(2)
    return strips, labels[:n].unflatten(0, (-1, length))


def dim(x: Tensor) -> Tensor:
    return x * 0.45


def multilabel() -> tuple[Data, Net]:
    """Which of the digits 0 to 4 are among two."""
    strips, labels = rows_of_digits(2)
    present = torch.stack([(labels == digit).any(1) for digit in range(5)], 1).float()
    network = nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 5))
    return Data(strips, present, dim), Net(network, F.binary_cross_entropy_with_logits)


def regression() -> tuple[Data, Net]:
    """How diabetes went on in a year, in hundreds; later on one measurement is missing."""
    x, y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))

    def without(x: Tensor) -> Tensor:
        return x.index_fill(1, torch.tensor([2]), 0.0)

    network = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 1), nn.Flatten(0))
    return Data(x * 20, y / 100, without), Net(network, F.mse_loss)


def ordinal() -> tuple[Data, Net]:
    """In which quarter of all patients `regression` puts one."""
    x, y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
    quarters = torch.bucketize(y, y.quantile(torch.tensor([0.25, 0.5, 0.75])))
    network = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 3))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, levels(target))

    return Data(x * 20, quarters, dim), Net(network, loss)


def levels(classes: Tensor) -> Tensor:
    return (torch.arange(3) < classes[:, None]).float()


def segmentation() -> tuple[Data, Net]:
    """Where there is ink, from a noisy image."""
    images, _ = digits()
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
    return Data(images + noise, (images[:, 0] > 0.5).long(), dim), Net(network, F.cross_entropy)


def sequence() -> tuple[Data, Net]:
    """Which digits stand in a row of three."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.transpose(1, 2), target)

    return Data(*rows_of_digits(3), dim), Net(Tokens(), loss)


@dataclass(frozen=True)
class Case:
    """A task, what it is for, and what right means, written down once more."""

    task: Task
    make: Callable[[], tuple[Data, Net]]
    right: Callable[[Tensor, Tensor], list[bool]]

    def counted(self, model: nn.Module, data: TensorDataset) -> Tensor:
        """Which samples a model gets right, by a plain forward pass of its own."""
        x, y = data.tensors
        training = model.training
        model.eval()
        with torch.no_grad():
            found = torch.tensor(self.right(model(x), y))
        model.train(training)
        return found


def iou_of_sets(output: Tensor, target: Tensor) -> list[bool]:
    found = []
    for image, truth in zip(output.argmax(1), target, strict=True):
        pairs = [((image == c) & (truth == c), (image == c) | (truth == c)) for c in truth.unique()]
        found.append(
            sum(float(both.sum() / either.sum()) for both, either in pairs) / len(pairs) >= 0.8
        )
    return found


def near(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs() < 0.5


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square()


CASES = {
    "multilabel": Case(Multilabel(), multilabel, lambda o, y: ((o > 0) == (y > 0)).all(1).tolist()),
    "regression": Case(Regression(0.5), regression, lambda o, y: near(o, y).tolist()),
    "ordinal": Case(Ordinal(), ordinal, lambda o, y: ((o > 0).sum(1) == y).tolist()),
    "segmentation": Case(Segmentation(0.8), segmentation, iou_of_sets),
    "sequence": Case(Sequence(), sequence, lambda o, y: (o.argmax(2) == y).all(1).tolist()),
    "custom": Case(Custom(near, squared), regression, lambda o, y: near(o, y).tolist()),
}
