"""Small problems that a repair solves in a blink: blobs in the plane, some of them where the
network has not looked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from options import with_options
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl import ParticleSwarm, SearchOptions, Settings, TensorSource
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.tasks import Task

QUICK = {
    "method": ParticleSwarm(particles=12, iterations=12),
    "search": SearchOptions(localizer=NeuRecoverLite(n_weights=12)),
}

ONE_AT_A_TIME = threading.Lock()
"""Ranks may be threads, which have one random state together."""


def blobs(n: int, shift: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`n x 4` points around three centres, and which of them; `shift` moves the first class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    centres = torch.tensor([[2.0, 0, 0, 1], [0, 2.0, 0, 1], [0, 0, 2.0, 1]])
    points = centres[labels] + 0.6 * torch.randn(n, 4, generator=generator)
    points[labels == 0] += torch.tensor([-shift, 0, 0, shift])
    return points, labels


def mlp(width: int = 12) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def trained(make: Callable[[], nn.Module] = mlp, seed: int = 0) -> nn.Module:
    """A network that has learned the blobs as they were, in training mode as training leaves it."""
    x, y = blobs(120, seed=seed)
    with ONE_AT_A_TIME, torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
    return model


def known(seed: int = 0, batch_size: int = 32, n: int = 120) -> list[TensorSource]:
    return [
        TensorSource(*blobs(n, seed=seed), split="train", passed=True, batch_size=batch_size),
        TensorSource(
            *blobs(n // 2, 1.5, seed + 1), split="new", failed=True, batch_size=batch_size
        ),
    ]


def unseen(seed: int = 0) -> list[TensorSource]:
    return [TensorSource(*blobs(80, 1.5, seed + 2), split="later")]


def quick(**arguments: Any) -> Settings:
    return Settings(**with_options({**QUICK, **arguments}))


@torch.no_grad()
def right(model: nn.Module, source: TensorSource) -> Tensor:
    """Which samples a model gets right in evaluation mode, by one forward pass of its own."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    found = model(source.inputs).argmax(1) == source.targets
    for module, training in flags:
        module.training = training
    return found


class Within(Task):
    """A regression task without classes and margins: right within a tolerance."""

    def passed(self, output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target).abs() < 0.5

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target).square()
