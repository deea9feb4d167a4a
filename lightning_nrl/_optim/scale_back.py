"""The way back: the furthest point between the original weights and others at which nothing is broken."""

from __future__ import annotations

import torch

from lightning_nrl._optim.active_set import ActiveSet
from lightning_nrl._optim.polish_result import PolishResult
from lightning_nrl._utils.state import State, between, snapshot
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.problem import Problem

__all__ = ["scale_back"]

BISECTIONS = 6
"""Halvings of the way, by what is known to be broken."""
MAX_COUNTS = 6
"""Counts of all known samples, each of which may show others that are broken there."""


def scale_back(problem: Problem, active_set: ActiveSet, state: State, rounds: int, deadline: Deadline) -> PolishResult:
    """The furthest of some states between the original weights and these that breaks nothing.

    What is broken says by bisection how far to go back. Then all known samples are counted; what else is broken there
    has a say in the next bisection. Where that does not end, or time is over after the first count, it is the original
    weights.

    Args:
        problem: what is known.
        active_set: margins under `state`.
        state: where the way begins.
        rounds: of steps that led there, for the result.
        deadline: after it only one more state is counted.
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
        if not active_set.broken.any():
            return PolishResult.counted(problem, scaled, after, rounds, strength)
        rows = torch.cat([rows, active_set.broken.nonzero().flatten()]).unique()
    return PolishResult.counted(problem, between(original, state, 0.0), problem.before, rounds, 0.0)
