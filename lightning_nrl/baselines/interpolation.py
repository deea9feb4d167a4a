"""Weights between the old and the fine-tuned network (backward-compatible weight interpolation, BCWI)."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from lightning_nrl.baselines.tuning import FineTuning
from lightning_nrl.methods.problem import Method, Problem, Proposal, Solution
from lightning_nrl.state import between, snapshot

__all__ = ["Interpolation"]


@dataclass(frozen=True)
class Interpolation:
    """The weights (1 - a) old + a new, nearest to the old ones, that get as many known samples right as the new do.

    So it lowers regressions without giving up the accuracy of the update (Schumann et al. 2024, Backward compatibility
    during data updates by weight interpolation). Every step of the path is kept in `others`.

    Attributes:
        new: the method whose weights are the far end.
        parts: a is looked at in steps of 1 / parts.
    """

    new: Method = field(default_factory=FineTuning)
    parts: int = 10

    def __call__(self, problem: Problem) -> Solution:
        return self.along(problem, self.new(problem))

    def along(self, problem: Problem, end: Solution) -> Solution:
        """The same from an end that has been found already, so that it need not be trained twice."""
        if end.proposal is None:
            return end
        clock = problem.clock
        before = clock.elapsed
        with clock.stage("judge"):
            old = snapshot(problem.model)
            path = [
                problem.propose(f"a = {float(a):g}", between(old, end.proposal.state, float(a)))
                for a in (Fraction(k, self.parts) for k in range(1, self.parts))
            ]
        path.append(end.proposal)
        chosen = next(proposal for proposal in path if _right(proposal) >= _right(end.proposal))
        step = chosen.step(clock.elapsed - before, f"{len(path)} mixtures looked at")
        others = tuple(proposal for proposal in path if proposal is not chosen)
        return Solution(chosen, steps=(*end.steps, step), others=others)


def _right(proposal: Proposal) -> int:
    return int((proposal.after.passed & proposal.after.loss.isfinite()).sum())
