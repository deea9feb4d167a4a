"""Strength by hand: samples on a line, each of which changes its class where the strength crosses
it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_nrl import TensorSource
from lightning_nrl.data.targets import AllFailures
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import find_scope
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Problem
from lightning_nrl.pipeline.baseline import EvaluatedData
from lightning_nrl.search import Fitness

PATCH = {"weight": torch.tensor([[0.0], [1.0]])}


def line(*crossings: float, split: str = "line", label: int = 1) -> TensorSource:
    """Samples that the model gives class 0 at strength 0, and class 1 from these strengths on."""
    inputs = torch.tensor([[1.0, -x] for x in crossings])
    return TensorSource(
        inputs, torch.full((len(crossings),), label), split=split, passed=True, failed=True
    )


class Line(nn.Module):
    """Logits 0 and t - crossing, t being the one weight that a patch changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] @ self.weight.T + x[:, 1:] * torch.tensor([0.0, 1.0])


def problem(*sources: TensorSource, **changes: Any) -> Problem:
    evaluator = Evaluator(Line().eval())
    before = evaluator.run(sources, AllFailures())
    space, _ = find_scope(nn.Linear(1, 2))
    settings = ("weight",), NeuRecoverLite(), Fitness(), before.passed
    return Problem(evaluator, sources, before, space, *settings, **changes)


def aside(own: Problem, *sources: TensorSource) -> EvaluatedData:
    return EvaluatedData(sources, own.evaluator.run(sources))
