"""Steps of a repair suit networks whose owners train at very different rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from digit_models import Digits, Few, quiet_trainer, right
from task_models import Net
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl import repair
from lightning_nrl.methods import Polish

GAIN = 1000


class Scaled(nn.Module):
    """A Linear whose weights count `gain` times, so that a rate fits if it is as much smaller."""

    def __init__(self, n_in: int, n_out: int, gain: float) -> None:
        super().__init__()
        self.layer = nn.Linear(n_in, n_out)
        self.gain = gain
        with torch.no_grad():
            self.layer.weight /= gain

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.gain * x)


class Network(Net):
    def __init__(self, gain: float, optimizer: Any) -> None:
        torch.manual_seed(0)
        sizes = [(64, 64), (64, 64)]
        layers = [module for size in sizes for module in (Scaled(*size, gain), nn.ReLU())]
        whole = nn.Sequential(nn.Flatten(), *layers, Scaled(64, 10, gain))
        super().__init__(whole, F.cross_entropy)
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


@pytest.mark.parametrize("method", ["finetune-polish", Polish()], ids=["training", "steps"])
@pytest.mark.parametrize(
    ("data", "gain", "pretrained", "optimizer"),
    [
        (Few(), 1, 0, lambda parameters: torch.optim.SGD(parameters, 0.1)),
        (Few(), 1, 0, lambda parameters: torch.optim.Adam(parameters, 1e-3)),
        (Digits(), GAIN, 20, lambda parameters: torch.optim.AdamW(parameters, 1e-2 / GAIN)),
    ],
    ids=["SGD", "Adam", "AdamW, pretrained"],
)
def test_a_repair_holds_at_any_rate(tmp_path, data, gain, pretrained, optimizer, method):
    model = Network(gain, optimizer)
    trainer = quiet_trainer(tmp_path, enable_checkpointing=False, max_epochs=15 + pretrained)
    trainer.fit(model, datamodule=data)
    parts = (data.train, data.repair)
    before = [right(model, part) for part in parts]
    repair(
        quiet_trainer(tmp_path, max_epochs=15), model, datamodule=data, method=method, verbose=False
    )
    after = [right(model, part) for part in parts]
    assert not any((old & ~new).any() for old, new in zip(before, after, strict=True))
    n_targets = int((~before[1]).sum())
    assert int((~before[1] & after[1]).sum()) >= 0.5 * n_targets > 5
