"""Polish: small steps near the decision boundary until new weights break no passed sample.

New weights repair much and break a little. The broken samples lie near the boundary; steps on
samples near it restore them and keep what is repaired. The result is the best iterate that breaks
nothing, counted on all known samples, or else the original weights. Below, "nothing is broken"
means that no more samples are broken than the gate allows. The last layer may restore samples
before the steps and after them, which takes no pass (`known_head`).

On request a polish **enforces** all failing targets, also targets far from right
(`TargetSchedule`). In limited time it stops pushing targets that are still wrong after some rounds,
restores broken samples, and then enforces these targets again. A retreat moves back toward the
original weights and **gives up** wrong targets of small sample weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_nrl._utils.formatting import plural
from lightning_nrl._utils.state import State, between, current_state, device_of
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import DeviceMemoryError
from lightning_nrl.evaluation.evaluator import Need, check_needs
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts
from lightning_nrl.methods.budget import (
    FORWARD_BACKWARD,
    MAX_RETREATS,
    MAX_ROUNDS,
    MAX_STALLED_ROUNDS,
    POLISH_SHARE,
    RESERVED_PASSES,
    RESTORING_SHARE,
    SMALL_BUDGET,
    STALLED_POLISH_SHARE,
)
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Proposal
from lightning_nrl.methods.solvers.active_set import (
    MIN_STEPS_PER_ROUND,
    POLISH_RATE,
    ActiveSet,
    TargetSchedule,
)
from lightning_nrl.methods.solvers.descent import Descent
from lightning_nrl.methods.solvers.known_head import restored_by_head
from lightning_nrl.methods.solvers.mini_batches import BATCH_SIZE
from lightning_nrl.records.steps import CUT, Step

NEEDS: tuple[Need, ...] = ("margins",)
RETREAT_FACTOR = 0.9  # part of the way from the original weights that a retreat keeps
# Starts that hold repairs; each retreat starts anew, and later starts may lose repairs.
HOLDING_STARTS = 3
# A round is taken back if it leaves more than this multiple of violated samples, and a few more.
TAKEN_BACK = 1.5
FEW_VIOLATED = 4
# Factors of the length of steps after a round: one that is taken back, one that restores samples,
# and one that restores none.
TAKEN_BACK_FACTOR, RESTORING_FACTOR, STALLED_FACTOR = 1 / 4, 1.25, 2.0
MOST_LENGTH = 16.0
BISECTIONS = 6  # of the way back, on samples known to be broken
# Prices of a broken sample's missing margin in `restored_by_head`, before steps and after them. The
# first restores what takes hardly a change; the second, what time is too short for, though that
# breaks more unseen samples than steps do.
PRICE_BEFORE, PRICE_AFTER = 1 / 4, 32.0
# Evaluations of all known samples on the way back; each may reveal more broken samples.
MAX_COUNTS = 6


@dataclass(frozen=True)
class PolishResult(Proposal):
    """Polished weights.

    `state` has all tensors of the initial state and, after steps, those of `Problem.scope`.
    """

    rounds: int = 0
    strength: float = 1.0  # part of the change that is kept; 0 for the original weights
    by_head: int = 0  # samples that the last layer restored in the end
    course: tuple[TargetCounts, ...] = ()  # flips at each evaluation of all known samples
    stopped: str = ""  # why the rounds ended early; empty if they did not

    @property
    def was_cut(self) -> bool:
        return self.stopped == CUT

    @property
    def note(self) -> str:
        note = plural(self.rounds, "round")
        if self.stopped:
            note += f", {self.stopped}"
        if self.by_head:
            note += f", then {plural(self.by_head, 'broken sample')} restored by the last layer"
        if self.strength < 1:
            note += f", then scaled back to {self.strength:.0%} of the change"
        return note


def polish(
    problem: Problem,
    state: State,
    *,
    deadline: Deadline | None = None,
    masks: Mapping[str, Tensor] | None = None,
    after: SampleResults | None = None,
    enforce: bool = False,
    visits: float | None = None,
) -> PolishResult:
    """Makes small steps from `state` until no more passed samples break than the gate allows.

    First the last layer, if it may change, restores what it can at a low price
    (`restored_by_head`). If steps do not suffice, it restores the others, or else the weights move
    back toward the original weights until this holds. Only parameters in `problem.scope` move. If
    `masks` has a bool tensor for a parameter, only weights marked there move. The last forward
    passes over known data may end after `deadline`. `state` may be on another device. `after` are
    its results; if None, they are measured. If `enforce` is True, steps push all failing targets;
    if False, they push only nearly right targets. Steps make about `visits` visits at most, by
    default `POLISH_SHARE` times those of a training.

    Memory: a forward and backward pass of at most 128 samples, four copies of the weights in the
    scope and two that are `parked`, and at most 256 MiB for the logits of the working set.
    """
    check_needs(NEEDS, problem.before, problem.evaluator.task)
    return problem.work.once(
        "polish",
        lambda: _Polish(
            problem, state, deadline or Deadline(), masks, after, enforce, visits
        ).result(),
        PolishResult,
    )


def polished(
    problem: Problem,
    start: Proposal,
    *,
    steered: bool = False,
    deadline: Deadline | None = None,
    enforce: bool = False,
    visits: float | None = None,
) -> tuple[Proposal, Step, tuple[TargetCounts, ...]]:
    """Returns the polished proposal, its step in the report, and the counts of each evaluation.

    If `steered`, targets of slices that miss their quota weigh more. `deadline` defaults to
    `deadline_of_method()`.
    """
    clock = problem.clock
    with clock.stage("polish"):
        began = clock.elapsed
        aim = problem.steered(start.after) if steered else problem
        if deadline is None:
            deadline = problem.deadline_of_method()
        result = polish(
            aim, start.state, deadline=deadline, after=start.after, enforce=enforce, visits=visits
        )
    proposal = problem.counted("polish", result.state, result.after)
    step = proposal.step(clock.elapsed - began, result.note, was_cut=result.was_cut)
    return proposal, step, result.course


Phase: TypeAlias = "Callable[[], Phase | None]"
"""A method of `_Polish` that returns the next phase, or None at the end."""


class _Polish:
    """A polish in progress. "Violated" are broken samples and enforced targets that are not right.

    `best` breaks nothing. Steps began or ended at the weights `state`. `after` are the last results
    on known data.
    """

    def __init__(
        self,
        problem: Problem,
        state: State,
        deadline: Deadline,
        masks: Mapping[str, Tensor] | None,
        after: SampleResults | None,
        enforce: bool,
        visits: float | None,
    ) -> None:
        self.problem = problem
        device = device_of(problem.model)
        self.state: State = {name: value.to(device) for name, value in state.items()}
        self.masks = masks
        self.best: PolishResult | None = None
        self.course: list[TargetCounts] = []
        self.rounds = self.retreats = self._rounds_left = 0
        self._fewest_violated = self._fewest_ever = math.inf
        self._visits = self._visits_at_low = 0.0
        self._length = 1.0
        self._fewest_since_count = math.inf
        # There is no training before a polish that enforces targets, so it has a minimum budget.
        self._budget = problem.visits if visits is None else visits
        self._most = POLISH_SHARE if visits is None else 1.0  # multiple of the budget
        if enforce and visits is None:
            self._budget = max(self._budget, FORWARD_BACKWARD * SMALL_BUDGET)
        self.stopped = ""
        self._deadline = deadline
        self._one_pass = problem.clock.one_pass
        # Of the last round; at first an estimate for the smallest round.
        visits_of_round = FORWARD_BACKWARD * MIN_STEPS_PER_ROUND * BATCH_SIZE
        self._round_seconds = visits_of_round / len(problem.before) * self._one_pass
        self.after = self._count(state) if after is None else after
        pushed = problem.before.targeted & enforce & ~self.after.judged_margin.isnan()
        pushed &= problem.before.has_margin
        takes_turns = deadline.is_set or visits is not None
        self.targets = TargetSchedule(problem, pushed, takes_turns=takes_turns)
        self.targets.begin(self._end_of_rounds)
        self._n_first = 0  # violated samples at the first start
        self._by_head = 0
        self._restore(PRICE_BEFORE)

    def result(self) -> PolishResult:
        phase: Phase | None = self.start
        while phase is not None:
            phase = phase()
        assert self.best is not None
        return replace(self.best, course=tuple(self.course), stopped=self.stopped)

    def start(self) -> Phase | None:
        """Starts steps at `state`: the given weights, or the weights after a retreat."""
        self.active_set = ActiveSet(
            self.problem,
            self.state,
            self.after,
            self.targets.enforced,
            holds_repairs=self.retreats < HOLDING_STARTS,
        )
        self._n_first = self._n_first or int(self.active_set.violated.sum())
        if self._is_satisfied(self.active_set.violated):
            self._keep(self.state)
            if not self._may_enforce_again or self._end_of_rounds.is_over():
                return None
            self._enforce_again()
        if self.active_set.infeasible.any():
            return self._scale_back
        self.descent = Descent(
            self.problem, self.state, partial(torch.optim.Adam, lr=POLISH_RATE), self.masks
        )
        self._renew_rounds()
        return self._stop(CUT) if self._is_time_over() else self._step

    def _step(self) -> Phase:
        self.targets.before_round(self.active_set)
        began = self._deadline.clock()
        self.descent.mark()
        margin = self.active_set.margin
        n_before = int(self.active_set.violated.sum())
        try:
            visits = self.active_set.round(self.descent, self._length)
            self._visits += visits / self._budget
        except DeviceMemoryError:
            return self._stop()
        self._round_seconds = self._deadline.clock() - began
        self.rounds += 1
        self._rounds_left -= 1
        if int(self.active_set.violated.sum()) > TAKEN_BACK * n_before + FEW_VIOLATED:
            self.descent.restore()
            self.active_set.margin = margin
            self._length *= TAKEN_BACK_FACTOR
            return self._after_round()
        is_violated = self.active_set.violated
        n_violated = int(is_violated.sum())
        self._adapt_length(n_violated)
        total = max(self._n_first, n_violated)
        self.problem.clock.tell(total - n_violated, total, broken=int(self.active_set.broken.sum()))
        if n_violated < self._fewest_ever:
            self._fewest_ever = n_violated
            self._visits_at_low = self._visits
        if n_violated < self._fewest_violated:
            self._fewest_violated = n_violated
            self._rounds_left = min(
                MAX_STALLED_ROUNDS, max(self._rounds_left, MAX_ROUNDS - self.rounds)
            )
        if self._is_satisfied(is_violated & self.active_set.working):
            return self._verify
        return self._after_round()

    def _adapt_length(self, n_violated: int) -> None:
        """Lengthens steps beyond 1 while rounds restore nothing.

        Steps that push targets stay short: long ones break what they do not see.
        """
        if self.targets.enforced.any() or n_violated < self._fewest_since_count:
            self._length = min(1.0, RESTORING_FACTOR * self._length)
        else:
            self._length = min(MOST_LENGTH, STALLED_FACTOR * self._length)
        self._fewest_since_count = min(self._fewest_since_count, n_violated)

    def _verify(self) -> Phase | None:
        """Evaluates all known samples; keeps the weights if no sample is violated."""
        state = self.descent.state()
        self.after = self._count(state)
        self.active_set.update(self.after)
        self._fewest_since_count = math.inf
        self._length = min(1.0, self._length)
        if self._is_satisfied(self.active_set.violated):
            if not self._keep(state) or not self._may_enforce_again:
                return None
            self._enforce_again()
            self._renew_rounds()
        return self._after_round()

    def _after_round(self) -> Phase:
        if self._is_time_over():
            return self._stop(CUT)
        if self._visits > self._most and self.best is None and self.targets.enforced.any():
            # Pushing takes all visits: what is right by now is kept, the rest given up.
            self.targets.enforced[:] = self.targets.wanted[:] = False
            self._most *= 1 + RESTORING_SHARE
            self._renew_rounds()
        if self._visits > self._most:
            return self._stop("stopped at its limit of forward passes")
        if self.best is not None and self._visits - self._visits_at_low > STALLED_POLISH_SHARE:
            return self._stop("stopped without progress")
        return self._step if self._rounds_left else self._retreat

    def _is_time_over(self) -> bool:
        """True if the time left is too short for another round."""
        return not self._end_of_rounds.leaves(self._round_seconds)

    def _stop(self, why: str = "") -> Phase:
        self.stopped = why
        self.state = self._end_descent()
        return self._scale_back

    def _end_descent(self) -> State:
        """Returns the weights that steps have reached, and frees the memory that steps need."""
        state = self.descent.state()
        del self.descent
        return state

    def _retreat(self) -> Phase:
        """Gives up targets and moves part of the way back to the original weights.

        First keeps the current weights as a result if nothing is broken and only enforced targets
        are still wrong.
        """
        state = self._end_descent()
        broken = self.active_set.broken & self.active_set.working
        if self.targets.enforced.any() and not broken.any():
            self.after = self._count(state)
            self.active_set.update(self.after)
            if not self.active_set.broken.any():
                self._keep(state)
        self.targets.give_up(self.active_set)
        self.state = between(current_state(self.problem.model), state, RETREAT_FACTOR)
        self.after = self._count(self.state)
        self.retreats += 1
        if self.retreats <= MAX_RETREATS:
            return self.start
        self.active_set.update(self.after)
        return self._scale_back

    def _scale_back(self) -> None:
        """Restores what is broken by the last layer, or goes back until nothing is broken.

        On the way back to the original weights, bisects on samples known to be broken, then
        evaluates all samples. This may reveal broken samples for the next bisection. Ends at the
        original weights after `MAX_COUNTS` evaluations, or if time runs out after the first.
        """
        self.after = self._count(self.state)
        self._by_head = self._restore(PRICE_AFTER)
        self.active_set.update(self.after)
        if self._is_satisfied(self.active_set.broken):
            self._keep(self.state)
            return
        original = current_state(self.problem.model)
        strength = 1.0
        rows = self.active_set.broken.nonzero().flatten()
        for counts in range(MAX_COUNTS):
            if len(rows):
                strength = self._largest_strength(original, rows, strength)
            if not strength or (counts and self._deadline.is_over()):
                break
            scaled = between(original, self.state, strength)
            self.after = self.problem.evaluate(scaled)
            self.active_set.update(self.after)
            if self._is_satisfied(self.active_set.broken):
                self._keep(scaled, strength)
                return
            rows = torch.cat([rows, self.active_set.broken.nonzero().flatten()]).unique()
        self.after = self.problem.before
        self._keep(between(original, self.state, 0.0), 0.0)

    def _restore(self, price: float) -> int:
        """Restores broken samples by the last layer, as far as it may, and returns how many."""
        start = self.problem.counted("polish", self.state, self.after)
        restored = start
        if self.masks is None:
            restored = restored_by_head(self.problem, start, price)
        self.state, self.after = restored.state, restored.after
        return start.broken - restored.broken

    def _largest_strength(self, original: State, rows: Tensor, most: float) -> float:
        """Bisects for the largest part of the change, below `most`, that breaks none of `rows`."""
        low = 0.0
        high = most
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self.active_set.breaks(between(original, self.state, middle), rows):
                high = middle
            else:
                low = middle
        return low

    @property
    def _end_of_rounds(self) -> Deadline:
        return self._deadline.earlier(RESERVED_PASSES * self._one_pass)

    @property
    def _may_enforce_again(self) -> bool:
        return self.targets.takes_turns and not self.targets.enforces_all

    def _is_satisfied(self, is_violated: Tensor) -> bool:
        """True if the gate allows the violated samples, `N` bool, without enforced targets."""
        broken = is_violated & self.problem.before.passed
        if not broken.any() or (is_violated & ~broken).any():
            return not is_violated.any()
        return not self.problem.excess(self.after, broken)

    def _enforce_again(self) -> None:
        self.targets.enforce_again(self.active_set, self._end_of_rounds)
        self._fewest_ever = math.inf
        self._visits_at_low = self._visits

    def _renew_rounds(self) -> None:
        self._rounds_left = MAX_STALLED_ROUNDS
        self._fewest_violated = math.inf

    def _keep(self, state: State, strength: float | None = None) -> bool:
        """Keeps `state`, whose results are in `after`, and returns True if it beats `best`."""
        if strength is None:
            strength = RETREAT_FACTOR**self.retreats
        proposal = self.problem.counted("polish", state, self.after)
        is_better = self.best is None or proposal.value > self.best.value
        if is_better:
            self.best = PolishResult(
                **vars(proposal), rounds=self.rounds, strength=strength, by_head=self._by_head
            )
        return is_better

    def _count(self, state: State) -> SampleResults:
        began = self._deadline.clock()
        after = self.problem.evaluate(state)
        self.course.append(self.problem.target_counts(after))
        self._one_pass = max(self._deadline.clock() - began, self.problem.clock.one_pass)
        return after
