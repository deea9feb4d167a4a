from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from baseline_problems import make_problem, threshold

from lightning_nrl import ConfigurationError
from lightning_nrl.analysis.baselines import Interpolation
from lightning_nrl.methods import Problem, Solution


@dataclass(frozen=True)
class Moved:
    """The threshold put elsewhere."""

    at: float

    def __call__(self, problem: Problem) -> Solution:
        return Solution(problem.propose("moved", {"weight": threshold(self.at).weight.detach()}))


@dataclass(frozen=True)
class Nothing:
    def __call__(self, problem: Problem) -> Solution:
        return Solution(None, "nothing was found.")


@pytest.mark.parametrize(
    ("share", "at", "repaired", "broken"),
    # A threshold below 0.7 repairs that sample, one below 0.6 breaks it, one below 0.5 repairs the other.
    [(0.125, 0.65625, 1, 0), (0.25, 0.5625, 1, 1), (0.5, 0.375, 2, 1), (1.0, 0.0, 2, 1)],
)
def test_it_lies_between_the_old_weights_and_the_new(share: float, at: float, repaired: int, broken: int) -> None:
    solution = Interpolation(Moved(0.0), share)(make_problem(threshold(0.75)))
    assert torch.equal(solution.proposal.state["weight"], threshold(at).weight)
    assert (solution.proposal.repaired, solution.proposal.broken) == (repaired, broken)
    assert [other.name for other in solution.others] == ["moved"]
    assert solution.steps[-1].note == f"a = {share:g}"


def test_nothing_new_is_nothing_between() -> None:
    solution = Interpolation(Nothing())(make_problem(threshold(0.75)))
    assert (solution.proposal, solution.reason) == (None, "nothing was found.")


@pytest.mark.parametrize("share", [0, 1.5, "half", True])
def test_a_share_is_above_none_and_at_most_all(share: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"`a=.*` is no share"):
        Interpolation(a=share)


def test_the_far_end_is_a_method() -> None:
    with pytest.raises(ConfigurationError, match="`new='fine-tuning'` is no method"):
        Interpolation("fine-tuning")  # type: ignore[arg-type]
