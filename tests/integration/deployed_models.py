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


class Smoothed(Plain):
    validation_step = no_validation_step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = torch.tensor([1.0, 5.0, 1.0, 0.1])
        return 3 * F.cross_entropy(self(batch[0]), batch[1], weight=weight, label_smoothing=0.2)


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


class StepScales(StepNormalises):
    def inputs(self, x: Tensor) -> Tensor:
        return x / 255


class StepEmbeds(StepNormalises):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 8)

    def inputs(self, x: Tensor) -> Tensor:
        return self.embedding(self.normalised(x))


class StepNormalisesWithNoise(StepNormalises):
    def inputs(self, x: Tensor) -> Tensor:
        return self.normalised(x) + 0.3 * torch.randn_like(x)


class MixedAndNormalised(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((self.normalised(batch[0]), batch[1]), batch_idx)


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


class PredictsTuples(Plain):
    """Its data for prediction are tuples of what `forward` takes."""

    validation_step = no_validation_step

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.net(self.normalised(torch.cat([left, right], 1)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(*batch[0]), batch[1])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(*batch) + self.teacher(self.normalised(torch.cat(batch, 1)))


class PredictsMembers(Plain):
    """An ensemble: logits of each member, `n x 2 x 4`."""

    validation_step = no_validation_step

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super().forward(x), self.teacher(self.normalised(x))], 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).mean(1), batch[1])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["inputs"])


class PredictsWithoutGradients(BothNormalise):
    @torch.no_grad()
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(self.inputs(batch[0]))


class PredictsOtherClasses(BothNormalise):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(self.inputs(batch[0])).argmax(1)


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

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {
            name: x for name, x in super().state_dict().items() if not name.startswith("backbone")
        }


class Renames(Plain):
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {f"old.{name}": x for name, x in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(
            {name[4:]: x for name, x in state_dict.items()}, *args, **kwargs
        )


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


class Adversarial(Plain):
    """Two networks, of which the first classifies; optimises by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 1e-2), torch.optim.Adam(
            self.discriminator.parameters(), 1e-3
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.normalised(batch[0]), batch[1]
        losses = F.cross_entropy(self.net(x), y), self.discriminator(x).square().mean()
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
