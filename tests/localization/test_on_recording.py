"""Localisation from a recording of known data, as a repair runs it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.localization import measure
from lightning_nrl.search.scoring.recording import record


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True)
        )
        self.block = nn.Sequential(
            nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(inplace=True)
        )
        self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.block(x)).mean((2, 3))
        return self.head(self.step(self.step(x).tanh()))


@pytest.mark.parametrize("aggregation", ["mean_gradient", "per_sample"])
@pytest.mark.parametrize("layers", [["stem.0", "block.1", "head"], ["step"]], ids=str)
def test_backward_is_that_of_autograd_through_the_whole_model(layers, aggregation):
    generator = torch.Generator().manual_seed(0)
    model = Residual().double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    x = torch.randn(150, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (150,), generator=generator)
    mask = torch.arange(150) % 4 == 0
    batches = [(Batch((x[r],), y[r], r), r) for r in torch.arange(150).split(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = find_layers(model, layers, include_bias=True)
        recording = record(Evaluator(model), batches, space, torch.ones(150, dtype=torch.bool))
    # A layer that is called twice is measured on the whole model.
    assert (recording.fallback_reason is None) == (layers != ["step"])
    impact = measure(recording, Evaluator(model), mask, aggregation=aggregation)
    parameters = [p for layer in layers for p in model.get_submodule(layer).parameters()]
    each = [
        torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), parameters)
        for a, b in zip(x[mask], y[mask], strict=True)
    ]
    flat = torch.stack([torch.cat([g.flatten() for g in one]) for one in each])
    expected = flat.mean(0).abs() if aggregation == "mean_gradient" else flat.abs().mean(0)
    torch.testing.assert_close(impact.backward, expected)
