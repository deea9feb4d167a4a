"""Localisation from a recording of known data, as a repair runs it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.localization import measure
from lightning_nrl.search._scoring.activation_cache import ActivationCache
from lightning_nrl.search._scoring.recording import record

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""

LAYERS = ["stem.0", "block.1", "head"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True))
        self.block = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(inplace=True))
        self.drop = nn.Dropout()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.block(x)).mean((2, 3))
        return self.head(self.drop(x))


class Recurrent(nn.Module):
    """Calls its layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.step(self.step(x.flatten(1)[:, :4]).tanh()))


def known(model: nn.Module) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    x = torch.randn(150, 1, 8, 8, generator=generator, dtype=torch.float64)
    return model.double().eval(), x, torch.randint(3, (150,), generator=generator)


def recording_of(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, layer: list[str], size: int = 40
) -> ActivationCache:
    rows = torch.arange(len(x)).split(size)
    batches = [(Batch((x[r],), y[r], r), r) for r in rows]
    space = find_layers(model, layer, include_bias=True)
    return record(Evaluator(model), batches, space, torch.ones(len(x), dtype=torch.bool))


def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor, layers: list[str]) -> torch.Tensor:
    parameters = [p for layer in layers for p in model.get_submodule(layer).parameters()]
    each = [
        torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), parameters) for a, b in zip(x, y, strict=True)
    ]
    return torch.stack([torch.cat([g.flatten() for g in one]) for one in each])


@pytest.mark.parametrize("aggregation", ["mean_gradient", "per_sample"])
@pytest.mark.parametrize("layers", [LAYERS, ["head"], ["block.1"]], ids=str)
def test_backward_is_that_of_autograd_through_the_whole_model(layers, aggregation):
    model, x, y = known(Residual())
    mask = torch.arange(150) % 4 == 0
    impact = measure(recording_of(model, x, y, layers), EVALUATOR, mask, aggregation=aggregation)
    each = gradients(model, x[mask], y[mask], layers)
    expected = each.mean(0).abs() if aggregation == "mean_gradient" else each.abs().mean(0)
    torch.testing.assert_close(impact.backward, expected)
    assert impact.n_samples == 38


@pytest.mark.filterwarnings("ignore:`layer`")
@pytest.mark.parametrize("aggregation", ["mean_gradient", "per_sample"])
def test_a_model_that_cannot_be_replayed_is_measured_as_a_whole(aggregation):
    model, x, y = known(Recurrent())
    recording = recording_of(model, x, y, ["step"])
    assert recording.fallback_reason is not None
    impact = measure(recording, EVALUATOR, y == 1, aggregation=aggregation)
    each = gradients(model, x[y == 1], y[y == 1], ["step"])
    expected = each.mean(0).abs() if aggregation == "mean_gradient" else each.abs().mean(0)
    torch.testing.assert_close(impact.backward, expected)
