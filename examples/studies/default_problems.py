"""Six small problems for `defaults.py`: tables, series, images; drift, rare classes, noisy labels.

The data are generated from a seed or come with scikit-learn. Each problem has a typical network,
optimizer and, in some cases, a learning-rate schedule. A training takes 2 to 8 s on one core.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits, make_classification
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import TensorDataset

sys.path.append(str(Path(__file__).parents[1]))
from output import Splits
from problems import Problem

from lightning_nrl import Target

SPLITS = ("train", "repair", "test")
Schedule = Callable[[Optimizer, Trainer], object]


class Small(Splits):
    """Batches of `(inputs, label)`."""

    def __init__(
        self, inputs: Tensor, labels: Tensor, sizes: tuple[int, int, int], batch_size: int = 64
    ) -> None:
        super().__init__()
        parts = zip(inputs.split(sizes), labels.split(sizes), strict=True)
        self.data = {split: TensorDataset(*part) for split, part in zip(SPLITS, parts, strict=True)}
        self.batch_size = batch_size


class Classifier(LightningModule):
    """Classifier trained with cross-entropy; `schedule` makes the learning-rate schedule."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.network, self.optimizer, self.schedule = network, optimizer, schedule

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> object:
        optimizer = self.optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer, self.trainer)}


class Recurrent(nn.Module):
    """Recurrent layer, a pooling of its outputs `n x length x 32`, and a Linear layer."""

    def __init__(self, layer: nn.Module, read: Callable[[Tensor], Tensor], classes: int) -> None:
        super().__init__()
        self.recurrent, self.read, self.classifier = layer, read, nn.Linear(32, classes)

    def forward(self, series: Tensor) -> Tensor:
        return self.classifier(self.read(self.recurrent(series)[0]))


def table(
    seed: int, n: int, features: int, classes: int, **arguments: object
) -> tuple[Tensor, Tensor]:
    inputs, labels = make_classification(
        n,
        features,
        n_informative=features // 2,
        n_redundant=2,
        n_classes=classes,
        random_state=seed,
        **arguments,
    )
    return torch.from_numpy(inputs).float(), torch.from_numpy(labels).long()


def rare_classes(seed: int) -> Small:
    """Makes a table of 20 features and 6 classes; three classes have 4 % of the samples each."""
    weights = [0.4, 0.3, 0.18, 0.04, 0.04, 0.04]
    inputs, labels = table(
        seed, 7_000, 20, 6, n_clusters_per_class=3, class_sep=1.6, weights=weights, flip_y=0
    )
    return Small(inputs, labels, (2_500, 900, 3_600))


def table_net() -> Classifier:
    """Batch norm and dropout; SGD with a one-cycle schedule."""
    layers = (
        *(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2)),
        nn.Linear(64, 6),
    )
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return Classifier(nn.Sequential(*layers), optimizer, one_cycle)


def one_cycle(optimizer: Optimizer, trainer: Trainer) -> object:
    steps = int(trainer.estimated_stepping_batches)
    return {
        "scheduler": lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], steps),
        "interval": "step",
    }


def drifting_sensors(seed: int) -> Small:
    """Makes a table of 16 features and 5 classes.

    Later, four features of a third of the samples are offset.
    """
    inputs, labels = table(seed, 6_500, 16, 5, n_clusters_per_class=2, class_sep=2.0, flip_y=0)
    drifted = torch.rand(len(inputs), generator=torch.Generator().manual_seed(seed)) < 0.33
    drifted[:2_500] = False
    inputs[drifted, :4] = 0.8 * inputs[drifted, :4] + 1.0
    return Small(inputs, labels, (2_500, 800, 3_200))


def sensor_net() -> Classifier:
    """Linear layers without norm or dropout; Adam without a schedule."""
    layers = (nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    return Classifier(nn.Sequential(*layers), partial(torch.optim.Adam, lr=2e-3))


def waves(seed: int) -> Small:
    """Makes series of one channel and 5 wave shapes; later, 40 % are faster than in training."""
    n, length = 4_400, 40
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, 1).uniform_(low, high, generator=generator)

    faster = torch.rand(n, 1, generator=generator) < 0.4
    faster[:1_400] = False
    periods = torch.where(faster, uniform(5, 8), uniform(9, 20))
    phases = torch.arange(length) / periods + uniform(0, 1)
    sines, ramps = (2 * math.pi * phases).sin(), 2 * (phases % 1) - 1
    shapes = torch.stack([sines, sines.sign(), ramps, -ramps, 2 * ramps.abs() - 1])
    labels = torch.randint(5, (n,), generator=generator)
    series = uniform(0.6, 1.4) * shapes[labels, torch.arange(n)] + 0.3 * torch.randn(
        n, length, generator=generator
    )
    return Small(series[..., None], labels, (1_400, 600, 2_400))


def wave_net() -> Classifier:
    """A GRU; Adam with a cosine schedule."""
    network = Recurrent(nn.GRU(1, 32, batch_first=True), lambda outputs: outputs.mean(1), 5)
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    return Classifier(
        network,
        optimizer,
        lambda own, trainer: lr_scheduler.CosineAnnealingLR(own, trainer.max_epochs),
    )


def gestures(seed: int) -> Small:
    """Makes few, long, noisy series of three channels.

    The class is the order of three pulses (6 classes).
    """
    n, length, orders = (
        4_000,
        60,
        torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]),
    )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (n,), generator=generator)
    centres = (orders[labels] + 0.5) * length / 3 + 3.0 * torch.randn(n, 3, generator=generator)
    distances = torch.arange(length)[None, :, None] - centres[:, None]
    pulses = (-(distances**2) / 18).exp() * torch.empty(n, 1, 3).uniform_(
        0.6, 1.4, generator=generator
    )
    return Small(
        pulses + 0.9 * torch.randn(n, length, 3, generator=generator),
        labels,
        (1_200, 300, 2_500),
        32,
    )


def gesture_net() -> Classifier:
    """LSTM that underfits its training data; Adam without a schedule."""
    network = Recurrent(nn.LSTM(3, 32, batch_first=True), lambda outputs: outputs[:, -1], 6)
    return Classifier(network, partial(torch.optim.Adam, lr=1e-3))


def noisy_labels(seed: int) -> Small:
    """Makes 12 x 12 images of 6 shapes, filled or outlined; 5 % of the known labels are wrong."""
    n, known, pixels = 5_000, 2_600, torch.arange(12)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (n,), generator=generator)
    centres = torch.empty(2, n, 1, 1).uniform_(4, 7, generator=generator)
    radii = torch.empty(n, 1, 1).uniform_(2.5, 4.5, generator=generator)
    down, right = (pixels[:, None] - centres[0]), (pixels - centres[1])
    circle, square = (down**2 + right**2).sqrt(), torch.maximum(down.abs(), right.abs())
    diamond = down.abs() + right.abs()
    distances = torch.stack([circle - radii, square - radii, diamond - 1.3 * radii])
    shapes = torch.cat([(0.5 - distances).clamp(0, 1), (1.2 - distances.abs()).clamp(0, 1)])
    images = shapes[labels, torch.arange(n)][:, None]
    images = images + 0.3 * torch.randn(images.shape, generator=generator)
    wrong = torch.rand(n, generator=generator) < 0.05
    wrong[known:] = False
    given = torch.where(
        wrong, (labels + torch.randint(1, 6, (n,), generator=generator)) % 6, labels
    )
    return Small(images, given, (1_800, 800, 2_400))


def shape_net() -> Classifier:
    """Two convolutions, dropout; AdamW with steps in its rate."""
    layers = (
        *(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(24 * 9, 48), nn.ReLU(), nn.Linear(48, 6)),
    )
    optimizer = partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2)
    return Classifier(
        nn.Sequential(*layers),
        optimizer,
        lambda own, _: lr_scheduler.MultiStepLR(own, [12, 16], 0.2),
    )


def rotated_digits(seed: int) -> Small:
    """Loads scikit-learn's digits; later, 40 % are rotated by 25 to 50 degrees to either side."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.images), generator=generator)
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    rotated = torch.rand(len(images), generator=generator) < 0.4
    rotated[:600] = False
    angles = torch.empty(len(images)).uniform_(25, 50, generator=generator).deg2rad() * rotated
    angles[::2] *= -1
    rows = [
        torch.stack([angles.cos(), -angles.sin()], 1),
        torch.stack([angles.sin(), angles.cos()], 1),
    ]
    turns = F.pad(torch.stack(rows, 1), (0, 1))
    images = F.grid_sample(
        images, F.affine_grid(turns, list(images.shape), False), align_corners=False
    )
    return Small(images, torch.tensor(digits.target)[order], (600, 300, 897), 32)


def rotated_digit_net() -> Classifier:
    """Convolutions with batch norm, dropout; SGD without a schedule."""
    layers = (
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 16, 10)),
    )
    return Classifier(
        nn.Sequential(*layers), partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-4)
    )


SMALL = {
    "table, rare classes": Problem(rare_classes, table_net, 40, Target.all()),
    "table, drift": Problem(drifting_sensors, sensor_net, 40, Target.all()),
    "series, GRU": Problem(waves, wave_net, 20, Target.all()),
    "series, LSTM": Problem(gestures, gesture_net, 14, Target.all()),
    "images, noisy labels": Problem(noisy_labels, shape_net, 20, Target.all()),
    "digits, drift": Problem(rotated_digits, rotated_digit_net, 40, Target.all()),
}
