"""Small problems for the cases: points in the plane, handwritten digits, and networks that have
learned them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

Pair = tuple[Tensor, Tensor]


def blobs(n: int, shift: float = 0.0, seed: int = 0) -> Pair:
    """`n x 4` points around three centres, and which of them; `shift` moves the first class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    centres = torch.tensor([[2.0, 0, 0, 1], [0, 2.0, 0, 1], [0, 0, 2.0, 1]])
    points = centres[labels] + 0.6 * torch.randn(n, 4, generator=generator)
    points[labels == 0] += torch.tensor([-shift, 0, 0, shift])
    return points, labels


def mlp(width: int = 12, out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, out))


def deep() -> nn.Sequential:
    block = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), block, nn.Linear(8, 3))


def normed() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3)
    )


def fitted(
    model: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    seed: int = 0,
    steps: int = 60,
    loss: Any = F.cross_entropy,
) -> nn.Module:
    """A network after some steps on all data at once; the random state is as before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model()
        optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(made(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
    return made.eval()


def trained(model: Callable[[], nn.Module] = mlp, seed: int = 0, n: int = 120) -> nn.Module:
    return fitted(model, *blobs(n, seed=seed), seed=seed)


def retrained(model: Callable[[], nn.Module] = mlp, seed: int = 5) -> nn.Module:
    """The same network after a training on more data, the moved class among them."""
    x, y = (
        torch.cat(parts)
        for parts in zip(blobs(60, seed=seed), blobs(60, 1.5, seed + 1), strict=True)
    )
    return fitted(model, x, y, seed=seed)


@cache
def digits() -> Pair:
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1) / 16, torch.tensor(
        data.target
    )[order]


class Digits(LightningDataModule):
    """Batches of `(image, digit, noisy)`; noise is rare in training and common afterwards."""

    sizes = (400, 100, 203, 300)
    noisy = (0.0, 0.5, 0.5, 0.5)

    def __init__(self, shuffle: bool = True) -> None:
        super().__init__()
        self.shuffle = shuffle
        images, labels = (x[: sum(self.sizes)].clone() for x in digits())
        generator = torch.Generator().manual_seed(1)
        share = torch.cat(
            [torch.full((n,), p) for n, p in zip(self.sizes, self.noisy, strict=True)]
        )
        noisy = torch.rand(len(images), generator=generator) < share
        images = images + noisy.view(-1, 1, 1, 1) * 0.5 * torch.randn(
            images.shape, generator=generator
        )
        parts = zip(*(x.split(self.sizes) for x in (images, labels, noisy)), strict=True)
        self.train, self.val, self.repair, self.test = (TensorDataset(*part) for part in parts)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 32, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 64)

    def repair_dataloader(self) -> DataLoader:
        return DataLoader(self.repair, 64)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 64)


class Numbered(Digits):
    """Batches of `(image, digit, position)` in training, not shuffled."""

    def train_dataloader(self) -> DataLoader:
        images, labels, _ = self.train.tensors
        return DataLoader(TensorDataset(images, labels, torch.arange(len(labels))), 32)


class Repairless(Digits):
    """Has no data of its own to repair."""

    repair_dataloader = None  # type: ignore[assignment]


def flat_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(192, 10),
    )


NETWORKS = {"flat": flat_net, "conv": conv_net}


class Classifier(LightningModule):
    def __init__(self, network: str = "flat", lr: float = 3e-3, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.network = NETWORKS[network]()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        right = (self(batch[0]).argmax(1) == batch[1]).double()
        self.log("test_right", right.sum(), on_step=False, on_epoch=True, reduce_fx="sum")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


def quiet_trainer(path: Path, *given: Any, **arguments: Any) -> Trainer:
    """A trainer on one CPU process that shows nothing and writes below `path`."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(default_root_dir=path, callbacks=list(given), **{**defaults, **arguments})


def trained_checkpoint(path: Path, network: str) -> None:
    """Trains on digits and saves; the random state is as before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer = quiet_trainer(path.parent, max_epochs=6 if network == "flat" else 3)
        trainer.fit(Classifier(network), datamodule=Digits())
        trainer.save_checkpoint(path)


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


def _parts(x: Tensor, y: Tensor, weak: Callable[[Tensor], Tensor]) -> list[Pair]:
    """160 samples to train on, 90 and 80 later ones; `weak` changes more than half of the later
    ones.
    """
    sizes = (160, 90, 80)
    share = torch.cat([torch.full((n,), p) for n, p in zip(sizes, (0.0, 0.6, 0.6), strict=True)])
    chosen = torch.rand(len(share), generator=torch.Generator().manual_seed(3)) < share
    x, y = x[: len(share)].clone(), y[: len(share)]
    x[chosen] = weak(x[chosen])
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def _dim(x: Tensor) -> Tensor:
    return x * 0.45


def _without(x: Tensor) -> Tensor:
    return x.index_fill(1, torch.tensor([2]), 0.0)


def regression() -> tuple[list[Pair], Callable[[], nn.Module], Any]:
    """How diabetes went on in a year, in hundreds; later on one measurement is missing."""
    x, y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
    return _parts(x * 20, y / 100, _without), _regression_net, F.mse_loss


def _regression_net() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 1), nn.Flatten(0))


def sequence() -> tuple[list[Pair], Callable[[], nn.Module], Any]:
    """Which digits stand in a row of three; some are not known."""
    x, y = rows_of_digits(3)
    y = y.clone()
    y[::19, 2] = -100
    return _parts(x, y, _dim), Tokens, _token_loss


def _token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target)
