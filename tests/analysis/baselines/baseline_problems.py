"""A problem in the plane whose answers can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_nrl import Target, TensorSource
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import find_scope
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Problem
from lightning_nrl.search import Fitness


def threshold(at: float) -> nn.Linear:
    """Class 1 for points (x, 1) with x above a threshold, else class 0."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[0.0, at], [1.0, 0.0]])
    return model.eval()


def points(x: Sequence[float], labels: Sequence[int], split: str, **marks: Any) -> TensorSource:
    return TensorSource(torch.tensor([[value, 1.0] for value in x]), torch.tensor(labels), split, **marks)


def known() -> list[TensorSource]:
    """With the threshold at 0.75, all of `train` pass; of `new` 0.6 passes, and 0.7 and 0.5 are to be repaired."""
    return [
        points([-2, -1, 1, 2], [0, 0, 1, 1], "train", passed=True),
        points([0.6, 0.7, 0.5], [0, 1, 1], "new", failed=True),
    ]


def make_problem(model: nn.Module, sources: Sequence[Any] | None = None, layer: Any = "auto", **rest: Any) -> Problem:
    """The model in evaluation mode on known data, all failures of the marked sources to be repaired."""
    sources, evaluator = known() if sources is None else sources, Evaluator(model.eval())
    space, scope = find_scope(model, layer)
    before = evaluator.run(sources, Target.all())
    given: dict[str, Any] = {"whole": layer == "auto", **rest}
    return Problem(
        evaluator, sources, before, space, scope, NeuRecoverLite(), Fitness("lexicographic"), before.passed, **given
    )
