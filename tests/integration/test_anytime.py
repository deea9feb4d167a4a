"""A repair in limited time, by a clock that only passes through the network move."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from digit_models import digits, quiet_trainer, right
from task_models import Net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl import repair

SECONDS_A_SAMPLE = 0.02


class Clock:
    """Moves with each sample in the network's body: three times as far in a step of training."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def tick(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.seconds += SECONDS_A_SAMPLE * len(args[0]) * (3 if torch.is_grad_enabled() else 1)


def network(n_inputs: int, n_classes: int) -> Net:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(n_inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    parts = {"body": body, "head": nn.Linear(32, n_classes)}
    return Net(nn.Sequential(OrderedDict(parts)), F.cross_entropy, lr=1e-3)


class Data(NamedTuple):
    train: TensorDataset
    repair: TensorDataset

    @classmethod
    def of(cls, x: Tensor, y: Tensor, *sizes: int) -> Data:
        n = sum(sizes)
        return cls(*map(TensorDataset, x[:n].split(sizes), y[:n].split(sizes)))


def noisy_digits() -> Data:
    generator = torch.Generator().manual_seed(1)
    x, y = digits()
    noise = 0.35 * torch.randn(x.shape, generator=generator)
    noise[torch.rand(len(x), generator=generator) < 0.6] = 0
    noise[:500] = 0
    return Data.of((x + noise).flatten(1), y, 500, 640)


def drifted_clusters() -> Data:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(8, (1800,), generator=generator)
    x = (0.9 * torch.randn(8, 20, generator=generator))[y]
    x = x + torch.randn(1800, 20, generator=generator)
    x[800:] += 0.5 * torch.randn(20, generator=generator)
    return Data.of(x, y, 800, 1000)


def quadrants() -> Data:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1600, 6, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    return Data.of(x, y, 600, 1000)


@cache
def trained(make: Callable[[], Data]) -> tuple[Data, Net]:
    data = make()
    model = network(data.train[0][0].numel(), int(data.train.tensors[1].max()) + 1)
    trainer = quiet_trainer(None, enable_checkpointing=False, max_epochs=12)
    trainer.fit(model, DataLoader(data.train, 64, shuffle=True))
    return data, model


def repaired(
    folder: Path, clock: Clock, make: Callable[[], Data], *, passes: float, layer: str
) -> int:
    """Returns the number of repaired targets, after a check of what broke and of the time."""
    data, fitted = trained(make)
    model = deepcopy(fitted)
    before = [right(model, part) for part in data]
    one_pass = SECONDS_A_SAMPLE * sum(map(len, data))
    hook = model.network.body.register_forward_pre_hook(clock.tick)
    began = clock.seconds
    repair(
        quiet_trainer(folder, max_epochs=12),
        model,
        DataLoader(data.train, 64, shuffle=True),
        DataLoader(data.repair, 64),
        layer=layer,
        max_time=passes * one_pass,
        verbose=False,
    )
    used = (clock.seconds - began) / one_pass
    hook.remove()
    after = [right(model, part) for part in data]
    assert not any((old & ~new).any() for old, new in zip(before, after, strict=True))
    # Checks before the repair make steps on a batch.
    assert used <= 1.1 * passes + 0.5
    return int((~before[1] & after[1]).sum())


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (noisy_digits, "network.head"),
        (noisy_digits, "auto"),
        (drifted_clusters, "auto"),
        (quadrants, "network.head"),
    ],
)
def test_a_short_limit_repairs_and_a_longer_one_no_less(tmp_path, monkeypatch, make, layer):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    few, more, most = (
        repaired(tmp_path / str(passes), clock, make, passes=passes, layer=layer)
        for passes in (4, 7, 50)
    )
    assert 0 < few <= more
    assert 0.9 * more <= most
