"""Weights between the old and the fine-tuned network (backward-compatible weight interpolation, BCWI)."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_nrl._utils.state import between, snapshot
from lightning_nrl.analysis.baselines.fine_tuning import FineTuning
from lightning_nrl.errors import check_kind, check_real
from lightning_nrl.problem import Method, Problem, Solution

__all__ = ["Interpolation"]


@dataclass(frozen=True)
class Interpolation:
    """The weights (1 - a) old + a new: fewer regressions than the new ones for part of their gain.

    Schumann et al. 2024, Backward compatibility during data updates by weight interpolation. They choose a on data set
    aside; on data that the new weights were trained on, a = 1 is always the most accurate. So it is half unless told,
    which Wortsman et al. 2022 (Robust fine-tuning of zero-shot models) found good without any choice.

    Attributes:
        new: the method whose weights are the far end.
        a: the share of the new weights, above 0 and at most 1.

    Raises:
        ConfigurationError: on construction, if `new` is no method or `a` is out of its range.
    """

    new: Method = field(default_factory=FineTuning)
    a: float = 0.5

    def __post_init__(self) -> None:
        check_kind("new", self.new, callable(self.new), "method", "an object, such as FineTuning()")
        check_real("a", self.a, "share", "give a number above 0 and at most 1.", above=0, most=1)

    def __call__(self, problem: Problem) -> Solution:
        return self.towards(problem, self.new(problem))

    def towards(self, problem: Problem, end: Solution) -> Solution:
        """The same from an end that has been found already, so that it need not be trained twice."""
        if end.proposal is None:
            return end
        clock, began = problem.clock, problem.clock.elapsed
        with clock.stage("judge"):
            mixed = between(snapshot(problem.model), end.proposal.state, self.a)
            proposal = problem.propose("interpolate", mixed)
        step = proposal.step(clock.elapsed - began, f"a = {self.a:g}")
        return Solution(proposal, steps=(*end.steps, step), others=(end.proposal,))
