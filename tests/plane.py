"""Points on a line and a model with a threshold, whose answers can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_nrl import TensorSource
from lightning_nrl.methods import Method, Problem, Solution


def threshold(at: float) -> nn.Linear:
    """Class 1 for points (x, 1) with x above a threshold, else class 0."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[0.0, at], [1.0, 0.0]])
    return model


def points(x: Sequence[float], labels: Sequence[int], split: str, **marks: Any) -> TensorSource:
    return TensorSource(
        torch.tensor([[value, 1.0] for value in x]), torch.tensor(labels), split, **marks
    )


TRAIN = points([-2, -1, 1, 2], [0, 0, 1, 1], "train", passed=True)
"""With the threshold at 0.75 all pass."""


@dataclass
class Moved(Method):
    """The threshold put elsewhere; counts how often that is done."""

    at: float
    calls: int = 0

    def __call__(self, problem: Problem) -> Solution:
        self.calls += 1
        proposal = problem.propose("moved", {"weight": threshold(self.at).weight.detach()})
        return Solution(proposal, steps=(proposal.step(0.0, "by hand"),))
