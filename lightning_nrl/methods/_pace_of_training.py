"""How long an epoch of training would take, to plan by where time is limited."""

from __future__ import annotations

from lightning_nrl.problem import Problem
from lightning_nrl.problem.budget import PASSES_PER_VISIT, POLISH_PASSES

__all__ = ["epoch_seconds", "leaves_time_for_epochs"]


def epoch_seconds(problem: Problem) -> float:
    """Of training over all known data, by the time that the fit took, or by that of one pass."""
    training, n = problem.training, len(problem.before)
    if training is None or training.fit_seconds is None:
        return PASSES_PER_VISIT * problem.clock.one_pass
    return n * training.fit_seconds / max(1, training.visits)


def leaves_time_for_epochs(problem: Problem, epochs: float, share: float) -> bool:
    """Whether a share of the time that is left is enough for so many epochs and a polish; always without a limit."""
    seconds = epochs * epoch_seconds(problem) + POLISH_PASSES * problem.clock.one_pass
    return problem.deadline_of_method().leaves(seconds / share)
