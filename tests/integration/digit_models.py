"""Real data and real networks for tests that go through a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_package import Callback, LightningDataModule, LightningModule, Trainer, callbacks, pl
from options import with_options
from packaging.version import Version
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import ParticleSwarm, RegressionFreeRepair, RepairReport, SearchOptions
from lightning_nrl.localization import NeuRecoverLite

OVERWRITING = {
    "StochasticWeightAveraging": {"swa_lrs": 1e-3, "swa_epoch_start": 1},
    "ModelPruning": {"pruning_fn": "l1_unstructured", "amount": 0.3},
}
"""Callbacks that set weights when training ends, with arguments."""
if hasattr(callbacks, "WeightAveraging"):
    OVERWRITING["WeightAveraging"] = {}

since_2_6 = pytest.mark.skipif(
    Version(pl.__version__) < Version("2.6"), reason="Lightning does that since 2.6"
)

QUICK = {
    "method": ParticleSwarm(particles=20, iterations=20),
    "search": SearchOptions(localizer=NeuRecoverLite(n_weights=30)),
    "verbose": False,
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1) / 16, torch.tensor(
        data.target
    )[order]


class Digits(LightningDataModule):
    """Batches of `(image, digit, noisy)`; noise is rare in training and common afterwards."""

    sizes = (400, 100, 203, 300)
    noisy = (0.0, 0.0, 0.5, 0.5)

    def __init__(self, batch_size: int = 32, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = (x[: sum(self.sizes)].clone() for x in digits())
        generator = torch.Generator().manual_seed(1)
        share = torch.cat(
            [torch.full((n,), p) for n, p in zip(self.sizes, self.noisy, strict=True)]
        )
        noisy = torch.rand(len(images), generator=generator) < share
        images = images + noisy.view(-1, 1, 1, 1) * 0.5 * torch.randn(
            images.shape, generator=generator
        )
        parts = zip(*(x.split(self.sizes) for x in (images.to(dtype), labels, noisy)), strict=True)
        self.train, self.val, self.repair, self.test = (TensorDataset(*part) for part in parts)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 64)

    def repair_dataloader(self) -> DataLoader:
        return DataLoader(self.repair, 64)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 64)


class Few(Digits):
    sizes = (160, 32, 100, 64)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(256, 10),
    )


NETWORKS = {"mlp": mlp, "cnn": cnn}


class Classifier(LightningModule):
    def __init__(self, network: str = "mlp", lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
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


class Flat(nn.Module):
    """Another architecture, for other inputs: ten classes in reverse order."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, pixels: Tensor) -> Tensor:
        return self.inside(pixels.view(-1, 1, 8, 8)).flip(1)


def flattened(batch: Any) -> Any:
    """An adapter for it."""
    return (batch[0].flatten(1),), {}, batch[1]


class Manual(Classifier):
    """Takes its steps by hand."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Scheduled(Classifier):
    """Its schedule asks how long training is; one step more than that raises."""

    def steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        schedule = OneCycleLR(optimizer, 1e-2, total_steps=self.steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Untrainable(Classifier):
    """Fails the test if training begins."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("training has begun")


def is_noisy(batch: Any) -> Tensor:
    """Which samples of a batch of `Digits` are noisy."""
    return batch["noisy"] if isinstance(batch, Mapping) else batch[2]


def camera(batch: Any) -> list[str]:
    """The slice of each sample of `Digits`."""
    return ["noisy" if noisy else "clean" for noisy in batch[2].tolist()]


def digit(batch: Any) -> Tensor:
    return batch[1]


def nobody(batch: Any) -> Tensor:
    return torch.zeros(len(batch[0]), dtype=torch.bool)


def overwriting(name: str) -> Any:
    """A callback of `OVERWRITING`."""
    return getattr(callbacks, name)(**OVERWRITING[name])


def quiet_trainer(path: Any, *given: Any, **arguments: Any) -> Trainer:
    """A trainer on one CPU process that shows nothing and writes below `path`."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(default_root_dir=path, callbacks=list(given), **{**defaults, **arguments})


def quick_repair(**arguments: Any) -> RegressionFreeRepair:
    return RegressionFreeRepair(**with_options({**QUICK, **arguments}))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy, which does not move with the model."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    """True if two states, models or checkpoints by their paths have the same weights to the bit."""
    first, second = map(_state, (one, other))
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def _state(of: Any) -> Any:
    if isinstance(of, (str, Path)):
        return torch.load(of, weights_only=True)["state_dict"]
    return of.state_dict() if isinstance(of, nn.Module) else of


class Remember(Callback):
    """Keeps the weights when its turn comes after training; to stand before the repair."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = state_of(pl_module)


def right(model: LightningModule, data: TensorDataset) -> Tensor:
    """Which samples a model gets right, by a plain forward pass of its own."""
    images, labels = data.tensors[:2]
    training = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        found = model(images.to(next(model.parameters()).dtype)).argmax(1) == labels
    for module, flag in training.items():
        module.training = flag
    return found


def assert_counted(report: RepairReport, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """The counts are those of what was right in each split, and nothing known broke."""
    for split in report.splits:
        before, after = old[split.split], new[split.split]
        assert split.kept == int((before & after).sum())
        assert split.broken == int((before & ~after).sum())
        assert split.repaired == int((~before & after).sum())
        assert split.failing == int((~before & ~after).sum())
        assert not split.broken or split.role == "unseen"
