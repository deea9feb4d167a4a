"""Polish: small steps near the border until new weights break nothing that the old ones get right.

New weights repair much and break a little. A few hundred known samples lie near the border between right and wrong;
steps on them, with a random part of the rest held where it is, bring what broke back and keep what was repaired. The
count of zero is a real one: each time none of the followed samples is broken, all known samples are counted again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._optim.active_set import RATE, ActiveSet
from lightning_nrl._optim.descent import Descent
from lightning_nrl._utils.state import State, between, snapshot
from lightning_nrl.evaluation.flips import Flips
from lightning_nrl.evaluation.requirements import Need, check_needs
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.problem import Problem

__all__ = ["Polished", "polish"]

NEEDS: tuple[Need, ...] = ("margins",)
ROUNDS, ROUNDS_IN_ALL = 20, 100
"""Rounds that either suffice or will not, with targets that are insisted on since the last one that left fewer samples
open than ever, as long as these are not more than so many in all; then all weights go back to RETREAT of the way from
the original ones, where fewer samples are broken, and rounds begin again, at most RETREATS times."""
RETREAT, RETREATS = 0.9, 4
INSISTING, PART = 4, 0.4
"""Where time is limited, targets are insisted on for so many rounds, or for this part of it; then those that are not
right are let go until what broke on the way is mended, so that there is something to show. Then they are tried again,
for twice as many rounds."""
SCALINGS = 6
"""Halvings to find how far a step back is needed where rounds do not reach zero, on what is broken; and how often the
rest may turn out to be broken there."""
RESERVE = 3.0
"""Passes over known data that are left when rounds end: where a step back leads is counted."""


@dataclass(frozen=True)
class Polished:
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

    @property
    def note(self) -> str:
        """How it went, for a line of the report."""
        back = f", then back to {self.strength:.0%} of the way" if self.strength < 1 else ""
        return f"{self.rounds} round{'' if self.rounds == 1 else 's'}{back}"


def polish(
    problem: Problem,
    state: State,
    *,
    seconds: float = math.inf,
    masks: Mapping[str, Tensor] | None = None,
    after: SampleResults | None = None,
    insist: bool = False,
) -> Polished:
    """Steps from a state until no known passed sample is broken; where they do not get there, a step back that does.

    Memory: a forward and backward pass of at most 128 samples, four copies of the scope's weights, and in main memory
    the logits of followed samples, up to 256 MiB.

    Args:
        problem: the original model, what it does on known data, and which parameters may move.
        state: any new weights for it.
        seconds: how long it may take; the least is a few forward passes over all known data.
        masks: by name of a parameter of the scope, which of its weights may move; None: all.
        after: what the model does on known data under the given state, if that is known already.
        insist: whether the steps go on for failing targets too, however far from being right these are. Targets that
            are not right after some rounds are let go, those that count less first, and all of them for a while
            where time is limited; of all weights that broke nothing those that repair most count.

    Raises:
        ConfigurationError: the task has no margins.
    """
    check_needs(NEEDS, problem.before, problem.task)
    deadline, one_pass = time.perf_counter() + seconds, problem.clock.one_pass
    if after is None:
        after, one_pass = _timed(problem, state)
    old, done, best = snapshot(problem.model), 0, None
    wanted = _Wanted(problem, problem.before.targeted & insist & after.loss.isfinite())
    wanted.limit(deadline - RESERVE * one_pass)
    for retreats in range(RETREATS + 1):
        border = ActiveSet(problem, state, after, wanted.insisted)
        if not border.open.any():
            best = _most(best, _polished(problem, state, after, done, RETREAT**retreats))
            if math.isinf(deadline) or wanted.all_insisted or _is_late(problem, deadline - RESERVE * one_pass):
                return best
            wanted.insist(border, deadline - RESERVE * one_pass)
        if border.hopeless.any():
            break
        descent = Descent(problem, state, partial(torch.optim.Adam, lr=RATE), masks)
        left, fewest = ROUNDS, math.inf
        while left:
            wanted.round(border)
            border.steps(descent)
            done, now = done + 1, int(border.open.sum())
            left -= 1
            if wanted.insisted.any() and now < fewest:
                left, fewest = min(ROUNDS, max(left, ROUNDS_IN_ALL - done)), now
            if not (border.open & border.followed).any():
                after, one_pass = _timed(problem, descent.state())
                border.seen(after)
                if not border.open.any():
                    found = _polished(problem, descent.state(), after, done, RETREAT**retreats)
                    gained = best is None or found.gain > best.gain
                    best = _most(best, found)
                    if not gained or math.isinf(deadline) or wanted.all_insisted:
                        return best
                    wanted.insist(border, deadline - RESERVE * one_pass)
                    left, fewest = ROUNDS, math.inf
            if _is_late(problem, deadline - RESERVE * one_pass):
                return _most(best, _scaled_back(problem, border, descent.state(), done, deadline))
        if wanted.insisted.any() and not (border.broken & border.followed).any():
            after = problem.evaluate(descent.state())
            border.seen(after)
            if not border.broken.any():
                best = _most(best, _polished(problem, descent.state(), after, done, RETREAT**retreats))
        wanted.give_up(border)
        state = between(old, descent.state(), RETREAT)
        after, one_pass = _timed(problem, state)
    border.seen(after)
    return _most(best, _scaled_back(problem, border, state, done, deadline))


class _Wanted:
    """Targets that steps go on for, however far from being right they are.

    Args:
        problem: what they are targets of.
        rows: `N` bool, which they are.

    Attributes:
        insisted: `N` bool, those that steps go on for at present; the same tensor all the time.
    """

    def __init__(self, problem: Problem, rows: Tensor) -> None:
        self.problem, self.weight = problem, problem.before.weight
        self.rows, self.insisted = rows, rows.clone()
        self._rounds, self._most, self._until = 0, INSISTING, math.inf

    @property
    def all_insisted(self) -> bool:
        return torch.equal(self.insisted, self.rows)

    def limit(self, deadline: float) -> None:
        """From now on they are insisted on for some rounds, if time is limited, or for a part of it."""
        now = time.perf_counter()
        self._rounds, self._until = 0, now + PART * (deadline - now)

    def insist(self, border: ActiveSet, deadline: float) -> None:
        """Takes all of them up again, for twice as many rounds."""
        self.insisted |= self.rows
        border.followed |= self.rows
        self._most *= 2
        self.limit(deadline)

    def round(self, border: ActiveSet) -> None:
        """Before each round: lets go of what is not right where it is time to."""
        limited = math.isfinite(self._until) and self._rounds > 0
        if limited and (self._rounds >= self._most or _is_late(self.problem, self._until)):
            self.insisted &= ~border.open
        self._rounds += 1

    def give_up(self, border: ActiveSet) -> None:
        """Lets go for good of the lesser half, by weight, of what is not right; of all where they weigh the same.

        If all are right and something is broken all the same, those that it took most to get right are in its way.
        """
        late = self.insisted & border.open
        if not late.any() and self.insisted.any():
            late = self.insisted & (border.pressure >= border.pressure[self.insisted].max())
        if late.any():
            chosen = late & (self.weight <= self.weight[late].median())
            self.insisted &= ~chosen
            self.rows &= ~chosen


def _most(best: Polished | None, other: Polished) -> Polished:
    """The one whose repairs are worth more; both break nothing."""
    return other if best is None or other.gain > best.gain else best


def _is_late(problem: Problem, deadline: float) -> bool:
    """Whether time is over on any rank."""
    return math.isfinite(deadline) and problem.collective.any(time.perf_counter() > deadline)


def _scaled_back(problem: Problem, border: ActiveSet, state: State, rounds: int, deadline: float) -> Polished:
    """The furthest of some states between the original weights and these that breaks nothing.

    What is broken says how far to go back; then all known samples are counted, and what else is broken has a say too.
    """
    old, strength = snapshot(problem.model), 1.0
    rows = border.broken.nonzero().flatten()
    for checks in range(SCALINGS):
        least, most = 0.0, strength
        for _ in range(SCALINGS if len(rows) else 0):
            middle = (least + most) / 2
            if border.breaks(between(old, state, middle), rows):
                most = middle
            else:
                least = middle
        strength = least if len(rows) else most
        if not strength or (checks and _is_late(problem, deadline)):
            break
        tried = between(old, state, strength)
        after = problem.evaluate(tried)
        border.seen(after)
        if not border.broken.any():
            return _polished(problem, tried, after, rounds, strength)
        rows = torch.cat([rows, border.broken.nonzero().flatten()]).unique()
    return _polished(problem, between(old, state, 0.0), problem.before, rounds, 0.0)


def _timed(problem: Problem, state: State) -> tuple[SampleResults, float]:
    """What the model does on known data under a state, and how many seconds that took."""
    began = time.perf_counter()
    return problem.evaluate(state), time.perf_counter() - began


def _polished(problem: Problem, state: State, after: SampleResults, rounds: int, strength: float = 1.0) -> Polished:
    flips = Flips.between(problem.before, after)
    repaired = flips.repaired & problem.before.targeted
    gain = problem.before.gain(repaired)
    return Polished(state, after, int(repaired.sum()), int(flips.broken.sum()), gain, rounds, strength)
