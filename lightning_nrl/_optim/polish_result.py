"""What a polish gives: weights that break nothing, counted, and the way back to some."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_nrl._optim.active_set import ActiveSet
from lightning_nrl._utils.state import State, between, snapshot
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts
from lightning_nrl.problem import Problem, Proposal

__all__ = ["PolishResult", "better_of", "scale_back"]

BISECTIONS = 6
"""Halvings of the way, by what is known to be broken."""
MAX_COUNTS = 6
"""Counts of all known samples, each of which may show others that are broken there."""


@dataclass(frozen=True)
class PolishResult(Proposal):
    """Weights that break nothing: the given ones and, where steps were made, all parameters of the scope.

    Attributes:
        rounds: of steps that were made.
        strength: 1 if the steps sufficed; else how far from the original weights (0) to the last ones (1) it went back.
        course: what became of the known samples, each time that all were counted.
    """

    rounds: int = 0
    strength: float = 1.0
    course: tuple[TargetCounts, ...] = ()

    @classmethod
    def counted(
        cls, problem: Problem, state: State, after: SampleResults, rounds: int, strength: float = 1.0
    ) -> PolishResult:
        """A state with what it repairs and breaks on known data."""
        return cls(**vars(problem.counted("polish", state, after)), rounds=rounds, strength=strength)

    @property
    def note(self) -> str:
        """How it went, for a line of the report."""
        back = f", then back to {self.strength:.0%} of the way" if self.strength < 1 else ""
        return f"{self.rounds} round{'' if self.rounds == 1 else 's'}{back}"


def better_of(best: PolishResult | None, other: PolishResult) -> PolishResult:
    """The one whose repairs are worth more, of equals the first; both break nothing."""
    return other if best is None or other.gain > best.gain else best


def scale_back(problem: Problem, active_set: ActiveSet, state: State, rounds: int, deadline: Deadline) -> PolishResult:
    """The furthest of some states between the original weights and these that breaks no more than the gate allows.

    What is broken says by bisection how far to go back. Then all known samples are counted; what else is broken there
    has a say in the next bisection. Where that does not end, or time is over after the first count, it is the original
    weights. The active set has the margins under the given state; after the deadline one more state is counted.
    """
    original, strength = snapshot(problem.model), 1.0
    rows = active_set.broken.nonzero().flatten()
    for counts in range(MAX_COUNTS):
        low, high = 0.0, strength
        for _ in range(BISECTIONS if len(rows) else 0):
            middle = (low + high) / 2
            if active_set.breaks(between(original, state, middle), rows):
                high = middle
            else:
                low = middle
        strength = low if len(rows) else high
        if not strength or (counts and deadline.is_over()):
            break
        scaled = between(original, state, strength)
        after = problem.evaluate(scaled)
        active_set.update(after)
        if not active_set.broken.any() or not problem.excess(after, active_set.broken):
            return PolishResult.counted(problem, scaled, after, rounds, strength)
        rows = torch.cat([rows, active_set.broken.nonzero().flatten()]).unique()
    return PolishResult.counted(problem, between(original, state, 0.0), problem.before, rounds, 0.0)
