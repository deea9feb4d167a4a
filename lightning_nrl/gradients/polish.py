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
from torch.nn import functional as F

from lightning_nrl.batches import Batch
from lightning_nrl.evidence import Evidence
from lightning_nrl.flips import Flips
from lightning_nrl.gradients.descent import BATCH, MOST, Descent, Teacher, deal, draw, measured, outputs
from lightning_nrl.needs import Need, check_needs
from lightning_nrl.problem import Problem
from lightning_nrl.state import State, between, holding, snapshot

__all__ = ["Polished", "polish"]

NEEDS: tuple[Need, ...] = ("margins",)
TYPICAL = 8.0
"""The median margin of passed samples for which the numbers below are meant; they grow and shrink with it."""
SAFE = 1e-3
"""The margin without which a passed sample counts as broken, so that another batch size or device does not flip it."""
GOAL, RELATIVE_GOAL = 0.3, 0.5
"""Passed samples are pushed up to this margin, or to this part of the one they had, whichever is less."""
TARGET_GOAL = 0.1
"""Targets are pushed up to this margin; more would be paid for by passed samples."""
REACH = 0.3
"""Failing targets this close to being right are tried too."""
NEAR, FOLLOWED = 1.0, 2.0
"""Steps are on samples with a margin below NEAR; those below FOLLOWED are watched."""
REST = 8 * BATCH
"""Further passed samples, drawn once, that hold the model where it is."""
FOLLOW = 64 * BATCH
"""Followed samples at most, so that a round stays short however much is known."""
RATE = 5e-5
"""Of Adam. Each step moves what nobody looks at too, so small steps are better than few."""
FASTER, FASTEST = 1 / 8, 20.0
"""How much faster for each sample that is not right yet, while targets are insisted on, and at most: hundreds are out
of reach of small steps, and few are not worth large ones."""
STEPS = 8
"""In a round, at the least: few samples are gone through several times."""
HOLD = 5
PRESSURE = 1.4
"""What a broken sample's weight in the loss is multiplied with, round by round, until it is right."""
ROUNDS, INSISTING = 20, 40
"""Rounds that either suffice or will not, without and with targets that are insisted on; then all weights go back to
RETREAT of the way from the original ones, where fewer samples are broken, and rounds begin again, at most RETREATS
times."""
RETREAT, RETREATS = 0.9, 4
MENDING = 10
"""Rounds that are left, where time is limited, when targets that are still not right are let go: what broke on the way
to them needs these."""
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
    after: Evidence
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
    after: Evidence | None = None,
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
            are not right after some rounds are let go, those that count less first, and all of them in time to mend
            what broke; of all weights that broke nothing those that repair most count.

    Raises:
        ConfigurationError: the task has no margins.
    """
    check_needs(NEEDS, problem.before, problem.task)
    deadline, one_pass, one_round = time.perf_counter() + seconds, problem.clock.one_pass, 0.0
    if after is None:
        after, one_pass = _timed(problem, state)
    old, done, best = snapshot(problem.model), 0, None
    insisted, weight = problem.before.targeted & insist & after.loss.isfinite(), problem.before.weight
    for retreats in range(RETREATS + 1):
        border = _Border(problem, state, after, insisted)
        if not border.open.any():
            return _polished(problem, state, after, done, RETREAT**retreats)
        if border.hopeless.any():
            break
        descent = Descent(problem, state, partial(torch.optim.Adam, lr=RATE), masks)
        for _ in range(INSISTING if insisted.any() else ROUNDS):
            began = time.perf_counter()
            if done and _is_late(problem, deadline - RESERVE * one_pass - MENDING * one_round):
                insisted &= ~border.open
            border.steps(descent)
            done, one_round = done + 1, time.perf_counter() - began
            if not (border.open & border.followed).any():
                after, one_pass = _timed(problem, descent.state())
                border.seen(after)
                if not border.open.any():
                    return _polished(problem, descent.state(), after, done, RETREAT**retreats)
            if _is_late(problem, deadline - RESERVE * one_pass):
                return _most(best, _scaled_back(problem, border, descent.state(), done, deadline))
        if insisted.any() and not (border.broken & border.followed).any():
            after = problem.see(descent.state())
            border.seen(after)
            if not border.broken.any():
                best = _most(best, _polished(problem, descent.state(), after, done, RETREAT**retreats))
        left = insisted & border.open
        if left.any():
            # The lesser half, by weight; all of them where they weigh the same.
            insisted &= ~(left & (weight <= weight[left].median()))
        state = between(old, descent.state(), RETREAT)
        after, one_pass = _timed(problem, state)
    border.seen(after)
    return _most(best, _scaled_back(problem, border, state, done, deadline))


def _most(best: Polished | None, other: Polished) -> Polished:
    """The one whose repairs are worth more; both break nothing."""
    return other if best is None or other.gain > best.gain else best


def _is_late(problem: Problem, deadline: float) -> bool:
    """Whether time is over on any rank."""
    return math.isfinite(deadline) and problem.collective.any(time.perf_counter() > deadline)


def _scaled_back(problem: Problem, border: _Border, state: State, rounds: int, deadline: float) -> Polished:
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
        after = problem.see(tried)
        border.seen(after)
        if not border.broken.any():
            return _polished(problem, tried, after, rounds, strength)
        rows = torch.cat([rows, border.broken.nonzero().flatten()]).unique()
    return _polished(problem, between(old, state, 0.0), problem.before, rounds, 0.0)


def _timed(problem: Problem, state: State) -> tuple[Evidence, float]:
    """What the model does on known data under a state, and how many seconds that took."""
    began = time.perf_counter()
    return problem.see(state), time.perf_counter() - began


def _polished(problem: Problem, state: State, after: Evidence, rounds: int, strength: float = 1.0) -> Polished:
    flips = Flips.between(problem.before, after)
    repaired = flips.repaired & problem.before.targeted
    gain = problem.before.gain(repaired)
    return Polished(state, after, int(repaired.sum()), int(flips.broken.sum()), gain, rounds, strength)


class _Border:
    """Margins of all known samples as last measured, and the samples that are followed.

    A followed sample has a teacher: the given state where it is right, else the original model where that is.
    """

    def __init__(self, problem: Problem, state: State, after: Evidence, insisted: Tensor) -> None:
        before = problem.before
        self.problem, self.state, self.insisted = problem, state, insisted
        self.unit = float(before.margin[before.passed].median()) / TYPICAL
        self.right = after.passed
        self.asked = before.margin.clamp(max=SAFE * max(1.0, self.unit))
        self.goal = (RELATIVE_GOAL * before.margin).clamp(RELATIVE_GOAL * 0.05 * self.unit, GOAL * self.unit)
        weight = before.weight.float()
        self.weight = torch.where(before.passed, 1.0, weight.clamp(max=MOST))
        # Failing targets that count more are tried from further away.
        self.reach = -self.unit * REACH * torch.where(before.targeted, weight.clamp(1, MOST), 1.0)
        self.pressure = torch.where(before.passed, weight.clamp(max=MOST), 1.0)
        self.generator = torch.Generator().manual_seed(problem.seed)
        self.margin = _margins(after)
        # The given state where it is right, else the original model, which matters where that is right.
        self.teacher = Teacher(problem, (state, {}), (~self.right).long())
        self.followed = self._close()
        rest = (before.passed & ~self.followed).nonzero().flatten()
        self.followed[rest[torch.randperm(len(rest), generator=self.generator)[:REST]]] = True

    @property
    def broken(self) -> Tensor:
        """`N` bool: passed samples that do not have the margin that is asked of them."""
        return self.problem.before.passed & ~(self.margin >= self.asked)

    @property
    def open(self) -> Tensor:
        """`N` bool: broken samples, and targets insisted on that are not right yet."""
        return self.broken | (self.insisted & ~(self.margin >= SAFE * max(1.0, self.unit)))

    @property
    def hopeless(self) -> Tensor:
        """`N` bool: broken samples without a finite loss, which no step can mend and whose slopes would spoil all."""
        return self.broken & self.margin.isnan()

    def seen(self, after: Evidence) -> None:
        """All margins measured again; samples that came close are followed from now on."""
        self.margin = _margins(after)
        self.followed |= self._close()

    def breaks(self, state: State, rows: Tensor) -> bool:
        """Whether passed samples, some rows of the evidence, do not have under a state what is asked of them."""
        self.margin = measured(self.problem, self.margin, self._look(state, rows))
        return bool(self.broken[rows].any())

    def steps(self, descent: Descent) -> None:
        """A round: steps on the samples near the border and as many others, then their margins again."""
        before = self.problem.before
        self.pressure[self.open] *= PRESSURE
        wanted = ~before.passed & (self.margin.abs() < self.unit * NEAR) & (self.margin > self.reach)
        wanted |= self.insisted & (self.margin < self.unit * NEAR)
        near = self.followed & ((before.passed & (self.margin < self.unit * NEAR)) | wanted)
        core, rest = near.nonzero().flatten(), (self.followed & ~near).nonzero().flatten()
        rest = rest[torch.randperm(len(rest), generator=self.generator)[: len(core)]]
        weight = self.weight * torch.where(before.passed | self.insisted, self.pressure, wanted.float())
        goal = torch.where(before.passed, self.goal, TARGET_GOAL * self.unit)
        table = torch.stack([weight, goal, (self.right | before.passed).float()], 1)
        found: list[tuple[Tensor, Tensor]] = []

        def loss(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
            weight, goal, taught = table[rows].to(output.device).unbind(1)
            margin = self._margin(output, batch)
            found.append((rows, margin.detach()))
            kept = self.problem.task.divergence(output, self.teacher(batch, rows, output.shape), batch.target)
            return (weight * F.relu(goal - margin)).sum() + HOLD * (taught * kept).sum()

        ahead = int(self.open.sum()) if self.insisted.any() else 0
        rate = RATE * min(max(1.0, FASTER * ahead), FASTEST)
        rows = torch.cat([core, rest])
        batches = deal(rows, self.generator)
        while 0 < len(batches) < STEPS:
            batches += deal(rows, self.generator)
        for parts in draw(self.problem, batches):
            descent.step(parts, loss, rate=rate)
        self.margin = measured(self.problem, self.margin, found + self._look(descent.state(), core))

    def _close(self) -> Tensor:
        before, margin = self.problem.before, self.margin
        repaired = (self.right | before.targeted) & ~before.passed & (margin > self.reach)
        close = (before.passed & (margin < self.unit * FOLLOWED)) | (repaired & (margin < self.unit * FOLLOWED))
        rows = close.nonzero().flatten()
        first = torch.where(before.passed, margin, margin.abs())[rows].argsort(stable=True)[:FOLLOW]
        chosen = self.insisted.clone()
        chosen[rows[first]] = True
        return chosen

    @torch.no_grad()
    def _look(self, state: State, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows and margins of chosen samples of this rank's share under a state."""
        problem, found = self.problem, []
        with holding(problem.model, state):
            for parts in draw(problem, rows.split(BATCH) if len(rows) else ()):
                for batch, places in parts:
                    output = outputs(problem, batch)
                    finite = problem.task.loss(output, batch.target).isfinite()
                    found.append((places, torch.where(finite, self._margin(output, batch), torch.nan)))
        return found

    def _margin(self, output: Tensor, batch: Batch) -> Tensor:
        margin = self.problem.task.margin(output, batch.target)
        assert margin is not None
        return margin


def _margins(evidence: Evidence) -> Tensor:
    """Margins, NaN where the loss is not finite, since that counts as wrong, and below 0 where a tie was lost."""
    margin = torch.where(evidence.passed, evidence.margin, evidence.margin.clamp(max=-SAFE))
    return torch.where(evidence.loss.isfinite(), margin, torch.nan)
