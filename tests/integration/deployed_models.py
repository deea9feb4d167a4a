"""Modules whose steps, predictions and state dicts differ from `forward` and from one another, on
easy data.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from lightning_package import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

no_forward, no_validation_step = LightningModule.forward, LightningModule.validation_step


class Clusters(LightningDataModule):
    """Four classes of 8 numbers about 128, with a spread of about 40."""

    def __init__(self, n: int = 120) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        centre = 1.2 * torch.randn(4, 8, generator=generator)
        y = torch.randint(0, 4, (2 * n,), generator=generator)
        x = 128 + 40 * (centre[y] + torch.randn(2 * n, 8, generator=generator))
        self.train, self.val = TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, 32, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, 40)


class Plain(LightningModule):
    """Normalises in `forward`. The last Linear belongs to a teacher that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.teacher = nn.Linear(8, 4)

    def normalised(self, x: Tensor) -> Tensor:
        return (x - 128) / 40

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.normalised(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("right", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Mixed(Plain):
    """Mixup (Zhang et al. 2018)."""

    validation_step = no_validation_step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        share, order = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(len(x))
        logits = self(share * x + (1 - share) * x[order])
        return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[order])


class Flipped(Plain):
    """Augments without chance, and validates as it is."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0].flip(1)), batch[1])


class StepNormalises(Plain):
    validation_step = no_validation_step

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def inputs(self, x: Tensor) -> Tensor:
        return self.normalised(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(self.inputs(batch[0])), batch[1])


class StepNormalisesWithNoise(StepNormalises):
    def inputs(self, x: Tensor) -> Tensor:
        return self.normalised(x) + 0.3 * torch.randn_like(x)


class BothNormalise(StepNormalises):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(self.inputs(batch[0]))
        self.log("right", (logits.argmax(1) == batch[1]).float().mean())
        return F.cross_entropy(logits, batch[1])


class Predicts(BothNormalise):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(self.inputs(batch[0]))


class PredictsProbabilities(BothNormalise):
    """Its data for prediction have no labels."""

    def predict_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return self(self.inputs(x)).softmax(1)


class PredictsWithItsTeacher(Plain):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]) + 3 * self.teacher(self.normalised(batch[0]))


class PredictsTuples(Plain):
    """Its data for prediction are tuples of what `forward` takes."""

    validation_step = no_validation_step

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.net(self.normalised(torch.cat([left, right], 1)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(*batch[0]), batch[1])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(*batch) + self.teacher(self.normalised(torch.cat(batch, 1)))


class PredictsClasses(Plain):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)


class WithoutForward(BothNormalise):
    forward = no_forward

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(self.inputs(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(self.inputs(batch[0]))
        self.log("right", (logits.argmax(1) == batch[1]).float().mean())


def predict(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """An adapter for modules of this file, whatever their `forward` takes."""
    x, y = batch
    return module.net(module.normalised(x)), y


class LeavesOut(Plain):
    """A frozen backbone that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.backbone = nn.Linear(8, 8, bias=False)
        nn.init.eye_(self.backbone.weight).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(self.normalised(x)))

    def state_dict(self) -> dict[str, Any]:
        return {
            name: x for name, x in super().state_dict().items() if not name.startswith("backbone")
        }


class Averages(Plain):
    """Predicts with a moving average of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.average = deepcopy(self.net).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.net if self.training else self.average)(self.normalised(x))

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        for mean, weight in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(weight, 0.2)


class SavesAverage(Plain):
    """Saves a moving average of the weights under their names."""

    def __init__(self) -> None:
        super().__init__()
        self.average = {
            f"net.{name}": x.detach().clone() for name, x in self.net.named_parameters()
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().state_dict(*args, **kwargs), **self.average}
