"""Which failing targets a polish insists on, and when it lets some of them go."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrl._optim.active_set import ActiveSet
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.problem import Problem

__all__ = ["TargetSchedule"]

FIRST_INSISTING_ROUNDS, INSISTING_TIME_FRACTION = 4, 0.4
"""Where time is limited, targets are insisted on for so many rounds, or for this part of the time. Those that are not
right then are let go until what broke on the way is mended, so that there is a result. Then they are insisted on again,
for twice as many rounds."""


class TargetSchedule:
    """Targets that steps go on for, however far from being right they are.

    Attributes:
        wanted: `N` bool, those that are not given up for good.
        insisted: `N` bool, those of them that steps go on for at present; the same tensor all the time.
    """

    def __init__(self, problem: Problem, wanted: Tensor) -> None:
        self._weight = problem.before.weight
        self.wanted, self.insisted = wanted, wanted.clone()
        self._rounds, self._max_rounds, self._until = 0, FIRST_INSISTING_ROUNDS, Deadline()

    @property
    def insists_on_all(self) -> bool:
        """Whether no target is let go for the time being."""
        return torch.equal(self.insisted, self.wanted)

    def begin(self, deadline: Deadline) -> None:
        """From now on targets are insisted on for some rounds or a part of the time, if that is limited."""
        self._rounds, self._until = 0, deadline.within(INSISTING_TIME_FRACTION * deadline.seconds_left)

    def insist_again(self, active_set: ActiveSet, deadline: Deadline) -> None:
        """Insists on all that are wanted, for twice as many rounds."""
        self.insisted |= self.wanted
        active_set.working |= self.wanted
        self._max_rounds *= 2
        self.begin(deadline)

    def before_round(self, active_set: ActiveSet) -> None:
        """Lets go of what is not right for the time being, where the rounds or the time for it are over."""
        is_limited = self._until.is_set and self._rounds > 0
        if is_limited and (self._rounds >= self._max_rounds or self._until.is_over()):
            self.insisted &= ~active_set.open
        self._rounds += 1

    def give_up(self, active_set: ActiveSet) -> None:
        """Lets go for good of the lesser half, by weight, of what is not right; of all where they weigh the same.

        If all are right and something is broken all the same, those with the largest multiplier are in its way.
        """
        weight, multiplier = self._weight, active_set.multiplier
        late = self.insisted & active_set.open
        if not late.any() and self.insisted.any():
            late = self.insisted & (multiplier >= multiplier[self.insisted].max())
        if late.any():
            given_up = late & (weight <= weight[late].median())
            self.insisted &= ~given_up
            self.wanted &= ~given_up
