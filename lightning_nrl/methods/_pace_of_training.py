"""How long an epoch of training would take, to plan by where time is limited."""

from __future__ import annotations

from lightning_nrl.problem import Problem

__all__ = ["SECONDS_PER_VISIT", "epoch_seconds", "leaves_time_for_epochs"]

SECONDS_PER_VISIT = 3.0
"""Of a training step on a sample, in forward passes."""

RESERVED_PASSES_OF_POLISH = 12.0
"""Passes over known data that a polish takes."""


def epoch_seconds(problem: Problem) -> float:
    """Of training over all known data, by the time that the fit took, or by that of one pass."""
    training, n = problem.training, len(problem.before)
    if training is None or training.fit_seconds is None:
        return SECONDS_PER_VISIT * problem.clock.one_pass
    return n * training.fit_seconds / max(1, training.visits)


def leaves_time_for_epochs(problem: Problem, epochs: float, share: float) -> bool:
    """Whether a share of the time that is left is enough for so many epochs and a polish; always without a limit."""
    seconds = epochs * epoch_seconds(problem) + RESERVED_PASSES_OF_POLISH * problem.clock.one_pass
    return problem.deadline_of_method().leaves(seconds / share)
