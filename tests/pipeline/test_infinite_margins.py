"""Samples without a finite margin are judged and never pushed, and cost no method its repairs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from toy_repairs import known, right, trained

from lightning_nrl import BoundOptions, Settings, TensorSource, repair_module
from lightning_nrl.errors import DataWarning
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.tasks import Multiclass


class Odd(Multiclass):
    """Knows no margin of clear cases, right or wrong: it is infinite or NaN."""

    def margin(self, output: Tensor, target: Tensor) -> Tensor:
        margin = super().margin(output, target)
        margin = torch.where(margin.abs() > 4, torch.nan, margin)
        return torch.where(margin > 3.5, torch.inf, margin)


class Masked(nn.Module):
    """Rules out the last class for some points, and all classes but the first for others."""

    def __init__(self) -> None:
        super().__init__()
        self.network = trained()

    def forward(self, x: Tensor) -> Tensor:
        is_out = torch.zeros(len(x), 3, dtype=torch.bool)
        is_out[:, 2] = x[:, 2] < -0.3
        is_out[:, 1:] |= x[:, :1] > 3.2
        return self.network(x).masked_fill(is_out, -torch.inf)


def possible(model: nn.Module) -> list[TensorSource]:
    """The samples of which the model rules out no label."""
    sources = []
    for source in known():
        with torch.no_grad():
            loss = nn.functional.cross_entropy(
                model(source.inputs), source.targets, reduction="none"
            )
        samples = source.inputs[loss.isfinite()], source.targets[loss.isfinite()]
        marks = {"passed": source.passed, "failed": source.failed}
        sources.append(TensorSource(*samples, source.split, **marks))
    return sources


@pytest.mark.parametrize(("make", "task"), [(Masked, Multiclass()), (trained, Odd())])
@pytest.mark.parametrize("method", ["auto", "finetune-polish"])
def test_methods_repair_beside_samples_without_a_finite_margin(make, task, method):
    model = make()
    sources = possible(model)
    before = [right(model, source) for source in sources]
    settings = Settings(method=method, bounds=BoundOptions(sparse=0.0))
    with pytest.warns(DataWarning, match=r"no finite margin for \d+ known sample"):
        outcome = repair_module(Evaluator(model, task), sources, settings)
    assert outcome.report.status == "repaired"
    assert not outcome.report.choice.startswith("Only a search")
    outcome.write(model)
    after = [right(model, source) for source in sources]
    assert not any((old & ~new).any() for old, new in zip(before, after, strict=True))
    repaired = sum(int((~old & new).sum()) for old, new in zip(before, after, strict=True))
    assert repaired >= 5


def test_ordinary_samples_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        repair_module(trained(), known(), Settings(method="convex", layer="2"))
