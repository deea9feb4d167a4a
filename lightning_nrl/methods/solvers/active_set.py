"""An active-set method on margins: steps on the samples whose constraints may bind.

Every known passed sample is a constraint: its margin must stay above 0. Samples near the boundary
form the working set. The nearest of these samples are active: steps descend the hinge loss of each,
times a multiplier that grows while its constraint is violated. As many other samples of the set are
rehearsed: steps hold their logits near a `Teacher`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._utils.preserve import shuffled
from lightning_nrl._utils.state import State, temporary_weights
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.data import Batch
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.evaluation.sample_results import judged_margin
from lightning_nrl.methods.budget import (
    ENFORCING_TIME_FRACTION,
    FIRST_ENFORCING_ROUNDS,
    FORWARD_BACKWARD,
)
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.search_samples import nearest
from lightning_nrl.methods.solvers.descent import MAX_SAMPLE_WEIGHT, Descent
from lightning_nrl.methods.solvers.mini_batches import (
    BATCH_SIZE,
    load_batches,
    load_rows,
    merge_measurements,
    shuffled_batches,
)
from lightning_nrl.methods.solvers.teacher import DISTILLATION_WEIGHT, Teacher

# The margins below are for data whose passed samples have this median margin. They scale with the
# median of the data.
REFERENCE_MARGIN = 8.0
# Below it a passed sample counts as broken, so that another batch size or device does not flip it.
SAFETY_MARGIN = 1e-3
# Passed samples are pushed to half of their margin, at most 0.3.
HINGE_MARGIN = 0.3
HINGE_MARGIN_RATIO = 0.5
HINGE_OVER_REQUIRED = 1.2  # at least this multiple of the required margin
TARGET_HINGE_MARGIN = 0.1  # targets are pushed up to this; more would break passed samples
REACHABLE_MARGIN = 0.3  # failing targets this close to the boundary are pushed too
# Below the first a sample is active, below the second it is in the working set.
ACTIVE_MARGIN = 1.0
WORKING_SET_MARGIN = 2.0
MAX_REHEARSED = 8 * BATCH_SIZE  # passed samples drawn at random that hold the model in place
MAX_WORKING_SET = 64 * BATCH_SIZE  # keeps rounds short on large data
POLISH_RATE = 5e-5  # of Adam, at most; small, since each step moves unmeasured samples too
# What the first step of a round moves at most, see `Descent.limited_step`. Targets far from right
# need larger steps.
MOST_MOVED = 0.015
MOST_MOVED_BY_PUSHING = 0.1
# Factors of the rate: per broken sample, or per violated sample while targets are enforced. Small
# steps do not reach hundreds of samples, and few samples are not worth large steps.
RATE_PER_BROKEN_SAMPLE = 1 / 2
RATE_PER_VIOLATED_TARGET = 1 / 8
MAX_RATE_FACTOR = 20.0
MAX_VIOLATED_TO_MEASURE = 32  # if there are more, the margins measured during the steps suffice
MIN_STEPS_PER_ROUND = 8  # a round repeats its samples if they are few
MULTIPLIER_GROWTH = 1.4  # of a violated sample, per round
MAX_MULTIPLIER = 1e3  # half precision ends at some 60,000


class ActiveSet:
    """The last measured margin of each known sample, and the working set near the boundary.

    A margin is NaN if steps cannot change it (`judged_margin`). If the weights `state` get a sample
    right, steps keep its logits close to its logits under `state`. If `state` breaks a sample,
    steps pull its logits to the original model's. Steps push all targets in `enforced`, `N` bool,
    even if far from right. The caller may change this mask between rounds. If `holds_repairs` is
    False, steps ignore samples that the original model gets wrong, unless enforced.
    """

    def __init__(
        self,
        problem: Problem,
        state: State,
        after: SampleResults,
        enforced: Tensor,
        *,
        holds_repairs: bool,
    ) -> None:
        before = problem.before
        self.problem = problem
        self.enforced = enforced
        self._holds_repairs = holds_repairs
        self._unit = before.margin_unit / REFERENCE_MARGIN
        safety = SAFETY_MARGIN * max(1.0, self._unit)
        self._required = torch.where(before.passed, before.margin.clamp(max=safety), safety)
        self._required = self._required.nan_to_num(0.0)
        reserve = problem.rounding_reserve
        if reserve is not None:
            self._required = self._required.maximum(reserve)
        least = HINGE_MARGIN_RATIO * 0.05 * self._unit
        hinge = (HINGE_MARGIN_RATIO * before.margin).clamp(least, HINGE_MARGIN * self._unit)
        hinge = torch.where(before.passed, hinge, TARGET_HINGE_MARGIN * self._unit)
        # Steps end at the hinge, which must exceed the required margin.
        self._hinge = hinge.maximum(HINGE_OVER_REQUIRED * self._required)
        weight = before.weight.float()
        capped = weight.clamp(max=MAX_SAMPLE_WEIGHT)
        self._weight = torch.where(before.passed, 1.0, capped)
        self.multiplier = torch.where(before.passed, capped, 1.0)
        # Heavier failing targets are attempted from further away.
        reach = torch.where(before.targeted, weight.clamp(1, MAX_SAMPLE_WEIGHT), 1.0)
        self._reachable = -self._unit * REACHABLE_MARGIN * reach
        self._right = after.passed & (before.passed | holds_repairs)
        self._teacher = Teacher(problem, (state, {}), ~self._right)
        self._generator = torch.Generator().manual_seed(problem.seed)
        self.margin = _margins(after)
        self.working = self._close()
        far = (before.passed & before.has_margin & ~self.working).nonzero().flatten()
        self.working[shuffled(far, self._generator)[:MAX_REHEARSED]] = True

    @property
    def broken(self) -> Tensor:
        """`N` bool, passed samples whose margin is NaN or so small that rounding may fail them."""
        return self.problem.before.passed & ~(self.margin >= self._required)

    @property
    def violated(self) -> Tensor:
        """`N` bool, broken samples, and enforced targets that are still wrong."""
        wanted = self.problem.before.passed | self.enforced
        return wanted & ~(self.margin >= self._required)

    @property
    def infeasible(self) -> Tensor:
        """`N` bool, broken samples without a finite loss or margin.

        No step restores them, and their gradients spoil all steps.
        """
        return self.broken & self.margin.isnan()

    def update(self, after: SampleResults) -> None:
        """Takes all margins from `after`; samples near the boundary join the working set."""
        self.margin = _margins(after)
        self.working |= self._close()

    def breaks(self, state: State, rows: Tensor) -> bool:
        """True if `state` breaks a passed sample in `rows`, whose margins it measures."""
        self.margin = merge_measurements(self.problem, self.margin, self._measure(state, rows))
        return bool(self.broken[rows].any())

    def round(self, descent: Descent, length: float) -> float:
        """Makes a round of steps on the working set and updates margins.

        `length` is a factor of the largest step, and above 1 also of the learning rate.

        Returns:
            the visits (passes of one sample).
        """
        before = self.problem.before
        self.multiplier[self.violated] *= MULTIPLIER_GROWTH
        self.multiplier.clamp_(max=MAX_MULTIPLIER)
        near = self.margin < self._unit * ACTIVE_MARGIN
        attempted = self._attempted(near)
        is_active = self.working & ((before.passed & near) | attempted)
        active = is_active.nonzero().flatten()
        inactive = (self.working & ~is_active).nonzero().flatten()
        rehearsed = shuffled(inactive, self._generator)[: len(active)]
        is_pushed = before.passed | self.enforced
        weight = self._weight * torch.where(is_pushed, self.multiplier, attempted.float())
        is_taught = (self._right | before.passed).float()
        rows_of_round = torch.cat([active, rehearsed])
        used = rows_of_round.sort().values
        columns = [column[used] for column in (weight, self._hinge, is_taught)]
        # One transfer to the device per round.
        table = torch.stack(columns, 1).to(self.problem.device)
        measured = []

        def loss(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
            places = torch.searchsorted(used, rows).to(table.device, non_blocking=True)
            weight, hinge, is_taught = table[places].to(output.device).unbind(1)
            margin = self._margin(output, batch)
            measured.append((rows, margin.detach()))
            divergence = self.problem.evaluator.task.divergence(
                output, self._teacher(batch, rows, output.shape), batch.target
            )
            pushing = (weight * F.relu(hinge - margin)).sum()
            return pushing + DISTILLATION_WEIGHT * (is_taught * divergence).sum()

        rate = max(1.0, length) * self._rate()
        most = length * (MOST_MOVED_BY_PUSHING if self.enforced.any() else MOST_MOVED)
        self._teacher.prepare(rows_of_round)
        batches: list[Tensor] = []
        while len(used) and len(batches) < MIN_STEPS_PER_ROUND:
            batches += shuffled_batches(rows_of_round, self._generator)
        visits = FORWARD_BACKWARD * sum(map(len, batches))
        for number, parts in enumerate(load_batches(self.problem, batches)):
            if number == 0:
                descent.limited_step(parts, loss, rate=rate, most=most)
            else:
                descent.step(parts, loss, rate=rate)
        self.margin = merge_measurements(self.problem, self.margin, measured)
        if not self.enforced.any() or int(self.violated.sum()) <= MAX_VIOLATED_TO_MEASURE:
            measured = self._measure(descent.state(), active)
            self.margin = merge_measurements(self.problem, self.margin, measured)
            visits += len(active)
        return visits

    def _attempted(self, near: Tensor) -> Tensor:
        """Marks the failing samples to push: reachable ones, and enforced ones."""
        is_close = self.margin.abs() < self._unit * ACTIVE_MARGIN
        reachable = ~self.problem.before.passed & is_close & (self.margin > self._reachable)
        return (reachable & self._holds_repairs) | (self.enforced & near)

    def _rate(self) -> float:
        factor = RATE_PER_VIOLATED_TARGET if self.enforced.any() else RATE_PER_BROKEN_SAMPLE
        return POLISH_RATE * min(max(1.0, factor * int(self.violated.sum())), MAX_RATE_FACTOR)

    def _close(self) -> Tensor:
        """Marks enforced targets and the samples nearest to the boundary."""
        before = self.problem.before
        margin = self.margin
        repaired = (self._right | before.targeted) & ~before.passed & (margin > self._reachable)
        is_near = margin < self._unit * WORKING_SET_MARGIN
        candidates = (before.passed | repaired) & self.problem.used & before.has_margin & is_near
        distance = torch.where(before.passed, margin, margin.abs())
        close = self.enforced.clone()
        close[nearest(distance, candidates, MAX_WORKING_SET)] = True
        return close

    @torch.no_grad()
    def _measure(self, state: State, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        evaluator = self.problem.evaluator
        measured = []
        with temporary_weights(self.problem.model, state):
            for batch, places in load_rows(self.problem, rows):
                output = evaluator.output(batch)
                passed, loss = evaluator.task.passed_and_loss(output, batch.target)
                assert loss is not None
                margin = judged_margin(self._margin(output, batch), passed, loss)
                measured.append((places, margin))
        return measured

    def _margin(self, output: Tensor, batch: Batch) -> Tensor:
        margin = self.problem.evaluator.task.margin(output, batch.target)
        assert margin is not None
        return margin


def _margins(after: SampleResults) -> Tensor:
    """Returns the judged margins, below 0 if the sample fails on a tie."""
    margin = after.judged_margin
    return torch.where(after.passed, margin, margin.clamp(max=-SAFETY_MARGIN))


class TargetSchedule:
    """Decides which targets the steps of a polish push, even targets that are far from right.

    `wanted`, `N` bool, marks the targets that are not given up. `enforced`, a part of `wanted`,
    marks the targets that steps push at present. A target that takes too long leaves `enforced`
    until `enforce_again` is called.
    """

    def __init__(self, problem: Problem, wanted: Tensor, *, takes_turns: bool) -> None:
        self.wanted = wanted
        self.enforced = wanted.clone()
        self._weight = problem.before.weight
        self._rounds = 0
        self._max_rounds = FIRST_ENFORCING_ROUNDS
        self.takes_turns = takes_turns
        self._until = Deadline()

    @property
    def enforces_all(self) -> bool:
        return torch.equal(self.enforced, self.wanted)

    def begin(self, deadline: Deadline) -> None:
        self._rounds = 0
        self._until = deadline.within(ENFORCING_TIME_FRACTION * deadline.seconds_left)

    def enforce_again(self, active_set: ActiveSet, deadline: Deadline) -> None:
        """Enforces all targets in `wanted` again, for at most twice as many rounds as before."""
        self.enforced |= self.wanted
        active_set.working |= self.wanted
        self._max_rounds *= 2
        self.begin(deadline)

    def before_round(self, active_set: ActiveSet) -> None:
        """Counts a round.

        If targets take turns, wrong ones leave `enforced` when rounds or time for them are used up.
        """
        is_limited = self.takes_turns and self._rounds > 0
        if is_limited and (self._rounds >= self._max_rounds or self._until.is_over()):
            self.enforced &= ~active_set.violated
        self._rounds += 1

    def give_up(self, active_set: ActiveSet) -> None:
        """Gives up the wrong enforced targets whose sample weight is at most their median.

        If no enforced target is wrong, the targets that were wrong in the most rounds take the
        place of wrong ones.
        """
        multiplier = active_set.multiplier
        late = self.enforced & active_set.violated
        if not late.any() and self.enforced.any():
            late = self.enforced & (multiplier >= multiplier[self.enforced].max())
        if late.any():
            given_up = late & (self._weight <= self._weight[late].median())
            self.enforced &= ~given_up
            self.wanted &= ~given_up
