"""Which failing targets a polish insists on, and when it lets some of them go."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from lightning_nrl._optim.active_set import ActiveSet
from lightning_nrl.problem import Problem

__all__ = ["TargetSchedule", "is_late"]

FIRST_INSISTING_ROUNDS, INSISTING_TIME_FRACTION = 4, 0.4
"""Where time is limited, targets are insisted on for so many rounds, or for this part of the time. Those that are not
right then are let go until what broke on the way is mended, so that there is a result. Then they are insisted on again,
for twice as many rounds."""


class TargetSchedule:
    """Targets that steps go on for, however far from being right they are.

    Args:
        problem: whose targets they are.
        wanted: `N` bool, which of them.

    Attributes:
        wanted: `N` bool, those that are not given up for good.
        insisted: `N` bool, those of them that steps go on for at present; the same tensor all the time.
    """

    def __init__(self, problem: Problem, wanted: Tensor) -> None:
        self.problem = problem
        self.wanted, self.insisted = wanted, wanted.clone()
        self._rounds, self._max_rounds, self._until = 0, FIRST_INSISTING_ROUNDS, math.inf

    @property
    def insists_on_all(self) -> bool:
        """Whether no target is let go for the time being."""
        return torch.equal(self.insisted, self.wanted)

    def begin(self, deadline: float) -> None:
        """From now on targets are insisted on for some rounds or a part of the time, if that is limited."""
        now = time.perf_counter()
        self._rounds, self._until = 0, now + INSISTING_TIME_FRACTION * (deadline - now)

    def insist_again(self, active_set: ActiveSet, deadline: float) -> None:
        """Insists on all that are wanted, for twice as many rounds."""
        self.insisted |= self.wanted
        active_set.working |= self.wanted
        self._max_rounds *= 2
        self.begin(deadline)

    def before_round(self, active_set: ActiveSet) -> None:
        """Lets go of what is not right for the time being, where the rounds or the time for it are over."""
        is_limited = math.isfinite(self._until) and self._rounds > 0
        if is_limited and (self._rounds >= self._max_rounds or is_late(self.problem, self._until)):
            self.insisted &= ~active_set.open
        self._rounds += 1

    def give_up(self, active_set: ActiveSet) -> None:
        """Lets go for good of the lesser half, by weight, of what is not right; of all where they weigh the same.

        If all are right and something is broken all the same, those with the largest multiplier are in its way.
        """
        weight, multiplier = self.problem.before.weight, active_set.multiplier
        late = self.insisted & active_set.open
        if not late.any() and self.insisted.any():
            late = self.insisted & (multiplier >= multiplier[self.insisted].max())
        if late.any():
            given_up = late & (weight <= weight[late].median())
            self.insisted &= ~given_up
            self.wanted &= ~given_up


def is_late(problem: Problem, deadline: float) -> bool:
    """Whether time is over on any rank."""
    return math.isfinite(deadline) and problem.collective.any(time.perf_counter() > deadline)
