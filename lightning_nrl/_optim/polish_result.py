"""What a polish gives: weights that break nothing, counted."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_nrl._utils.state import State
from lightning_nrl.evaluation.flips import Flips
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.problem import Problem

__all__ = ["PolishResult", "better_of"]


@dataclass(frozen=True)
class PolishResult:
    """Weights that break nothing.

    Attributes:
        state: the tensors of the given state and, where steps were made, all parameters of the scope.
        after: what the deployed model does on known data under it.
        repaired: targeted samples that pass.
        broken: known passed samples that do not pass any more: 0.
        gain: what the repaired samples are worth.
        rounds: of steps that were made.
        strength: 1 if the steps sufficed; else how far from the original weights (0) to the last ones (1) it went back.
    """

    state: State
    after: SampleResults
    repaired: int
    broken: int
    gain: float
    rounds: int
    strength: float = 1.0

    @classmethod
    def counted(
        cls, problem: Problem, state: State, after: SampleResults, rounds: int, strength: float = 1.0
    ) -> PolishResult:
        """A state with what it repairs and breaks on known data."""
        flips = Flips.between(problem.before, after)
        repaired = flips.repaired & problem.before.targeted
        gain = problem.before.gain(repaired)
        return cls(state, after, int(repaired.sum()), int(flips.broken.sum()), gain, rounds, strength)

    @property
    def note(self) -> str:
        """How it went, for a line of the report."""
        back = f", then back to {self.strength:.0%} of the way" if self.strength < 1 else ""
        return f"{self.rounds} round{'' if self.rounds == 1 else 's'}{back}"


def better_of(best: PolishResult | None, other: PolishResult) -> PolishResult:
    """The one whose repairs are worth more, of equals the first; both break nothing."""
    return other if best is None or other.gain > best.gain else best
