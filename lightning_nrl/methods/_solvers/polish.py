"""Polish: small steps near the decision boundary until new weights break nothing that the original ones get right.

New weights repair much and break a little. What they break lies near the boundary; steps on it bring it back, and hold
what was repaired. The count of zero is a real one: no result leaves here without a count of all known samples.

A polish is always in one of five phases (`Phase`). It begins with START and **stops** in one of three places only:

- in START or VERIFY, when nothing is broken and there are no targets left to insist on again;
- in VERIFY, when nothing is broken, and insisting again has not repaired more than the best result so far;
- after SCALE_BACK. It **scales back** where time is over, where steps have failed from five starts, or where no step
  can help: a sample is broken whose loss is not finite, or a single sample does not fit in memory.

Of all the weights on its way that broke nothing, those whose repairs are worth most are the result; the original ones,
which break nothing, are the last resort.

What the gate allows to break may stay broken ("nothing broken" below: no more than that). Where steps have failed from
some starts, those from later ones let go of what was repaired near the border, since it stands in the way.

It **insists** on failing targets, if asked to, however far from right they are (`TargetSchedule`). Where time is
limited it lets those that are not right go after some rounds, so that what broke on their behalf can be mended, and
insists on them again once nothing is broken. With each retreat it **gives up** for good the lesser half of the targets
that are still not right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._utils.state import State, between, snapshot
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import DeviceMemoryError
from lightning_nrl.evaluation.evaluator import Need, check_needs
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts
from lightning_nrl.methods._solvers.active_set import POLISH_RATE, ActiveSet, TargetSchedule
from lightning_nrl.methods._solvers.descent import Descent
from lightning_nrl.methods.budget import MAX_RETREATS, MAX_ROUNDS, MAX_STALLED_ROUNDS, RESERVED_PASSES
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Proposal

NEEDS: tuple[Need, ...] = ("margins",)
RETREAT_FACTOR = 0.9
"""How much of the way from the original weights is left after a retreat, where fewer samples are broken."""
HOLDING_STARTS = 3
"""From so many starts steps hold what was repaired; from later ones it may be lost, since it stands in the way."""


class Phase(Enum):
    """What a polish does next.

    "Open" are broken samples, and targets insisted on that are not right; "late" means that no time is left but for a
    few passes over known data.
    """

    START = auto()
    """Begins with weights that were just counted on all known data: the given ones, or those after a retreat.

    Exit: nothing open -> a result; DONE, unless there is time to insist on targets again. A sample is broken whose loss
    is not finite -> SCALE_BACK. Else -> STEP.
    """

    STEP = auto()
    """One round of steps on the active samples.

    Exit: nothing open in the working set -> VERIFY. Late, or out of memory -> SCALE_BACK. No round left -> RETREAT.
    Else -> STEP.
    """

    VERIFY = auto()
    """Counts all known samples; what is open among them joins the working set.

    Exit: nothing open -> a result; DONE, if it is no better than the best or no target is left to insist on again.
    Else as from STEP.
    """

    RETREAT = auto()
    """The rounds were not enough. Gives up targets, goes back to nine tenths of the way from the original weights, and
    counts all known samples. If only targets were open, the weights before it are a result, too.

    Exit: START; after the fourth retreat from which steps failed as well, SCALE_BACK.
    """

    SCALE_BACK = auto()
    """Goes back from the last weights as far towards the original ones as it takes for nothing to be broken.

    Exit: a result; DONE.
    """

    DONE = auto()
    """The best result is given back."""


def polish(
    problem: Problem,
    state: State,
    *,
    deadline: Deadline | None = None,
    masks: Mapping[str, Tensor] | None = None,
    after: SampleResults | None = None,
    insist: bool = False,
) -> PolishResult:
    """Steps from a state until no known passed sample is broken; where they do not get there, a step back that does.

    Memory: a forward and backward pass of at most 128 samples, four copies of the scope's weights, and the logits of
    the working set, up to 256 MiB.

    Args:
        problem: its scope names the parameters that may move.
        state: any new weights for its model.
        deadline: when it has to be over, save for a few forward passes over known data; None: when it is done.
        masks: by name of a parameter of the scope, which of its weights may move; None: all.
        after: what the model does on known data under the given state, if that is known already.
        insist: whether steps go on for all failing targets; else only for those that are nearly right.

    Raises:
        ConfigurationError: the task has no margins.
    """
    check_needs(NEEDS, problem.before, problem.evaluator.task)

    def work() -> PolishResult:
        run, phase = _Polish(problem, state, deadline or Deadline(), masks, after, insist), Phase.START
        while phase is not Phase.DONE:
            phase = run.advance(phase)
        assert run.best is not None
        return replace(run.best, course=tuple(run.course))

    return problem.work.once("polish", work, PolishResult)


class _Polish:
    """A polish in progress; each phase is a method that gives the next one.

    Attributes:
        best: the result so far; it breaks nothing.
        state: where the present start began; once steps have ended, where they ended.
        after: the last count of all known samples.
        rounds: of steps that were made in all.
        course: what became of the known samples at each count.
    """

    def __init__(
        self,
        problem: Problem,
        state: State,
        deadline: Deadline,
        masks: Mapping[str, Tensor] | None,
        after: SampleResults | None,
        insist: bool,
    ) -> None:
        self.problem, self.state, self.masks = problem, state, masks
        self.best: PolishResult | None = None
        self.course: list[TargetCounts] = []
        self.rounds = self.retreats = 0
        self._rounds_left, self._fewest_open = MAX_STALLED_ROUNDS, math.inf
        self._deadline, self._one_pass = deadline, problem.clock.one_pass
        self.after = self._count(state) if after is None else after
        self.targets = TargetSchedule(problem, problem.before.targeted & insist & self.after.loss.isfinite())
        self.targets.begin(self._end_of_rounds)

    def advance(self, phase: Phase) -> Phase:
        """Does what a phase is for; gives the next one."""
        actions = {
            Phase.START: self._start,
            Phase.STEP: self._step,
            Phase.VERIFY: self._verify,
            Phase.RETREAT: self._retreat,
            Phase.SCALE_BACK: self._scale_back,
        }
        return actions[phase]()

    def _start(self) -> Phase:
        self.active_set = self._new_active_set()
        if self._is_settled(self.active_set.open):
            self._keep(self.state)
            if not self._may_insist_again or self._end_of_rounds.is_over():
                return Phase.DONE
            self.targets.insist_again(self.active_set, self._end_of_rounds)
        if self.active_set.hopeless.any():
            return Phase.SCALE_BACK
        self.descent = self._new_descent()
        self._renew_rounds()
        return Phase.STEP

    def _step(self) -> Phase:
        self.targets.before_round(self.active_set)
        try:
            self.active_set.round(self.descent)
        except DeviceMemoryError:
            return self._stop_steps()
        self.rounds += 1
        self._rounds_left -= 1
        is_open = self.active_set.open
        n_open = int(is_open.sum())
        if n_open < self._fewest_open:
            most = max(self._rounds_left, MAX_ROUNDS - self.rounds)
            self._rounds_left, self._fewest_open = min(MAX_STALLED_ROUNDS, most), n_open
        return Phase.VERIFY if self._is_settled(is_open & self.active_set.working) else self._after_round()

    def _verify(self) -> Phase:
        state = self.descent.state()
        self.after = self._count(state)
        self.active_set.update(self.after)
        if self._is_settled(self.active_set.open):
            if not self._keep(state) or not self._may_insist_again:
                return Phase.DONE
            self.targets.insist_again(self.active_set, self._end_of_rounds)
            self._renew_rounds()
        return self._after_round()

    def _after_round(self) -> Phase:
        if self._end_of_rounds.is_over():
            return self._stop_steps()
        return Phase.STEP if self._rounds_left else Phase.RETREAT

    def _stop_steps(self) -> Phase:
        self.state = self.descent.state()
        return Phase.SCALE_BACK

    def _retreat(self) -> Phase:
        state = self.descent.state()
        if self.targets.insisted.any() and not (self.active_set.broken & self.active_set.working).any():
            self.after = self._count(state)
            self.active_set.update(self.after)
            if not self.active_set.broken.any():
                self._keep(state)
        self.targets.give_up(self.active_set)
        self.state = between(snapshot(self.problem.model), state, RETREAT_FACTOR)
        self.after = self._count(self.state)
        self.retreats += 1
        if self.retreats <= MAX_RETREATS:
            return Phase.START
        self.active_set.update(self.after)
        return Phase.SCALE_BACK

    def _scale_back(self) -> Phase:
        found = scale_back(self.problem, self.active_set, self.state, self.rounds, self._deadline)
        self.best = better_of(self.best, found)
        return Phase.DONE

    @property
    def _end_of_rounds(self) -> Deadline:
        """When rounds must end, so that the way back can be counted."""
        return self._deadline.earlier(RESERVED_PASSES * self._one_pass)

    @property
    def _may_insist_again(self) -> bool:
        """Whether targets were let go, as happens only where time is limited."""
        return self._deadline.is_set and not self.targets.insists_on_all

    def _is_settled(self, is_open: Tensor) -> bool:
        """Whether open samples, `N` bool, are no more than the gate allows, and no targets that are insisted on."""
        broken = is_open & self.problem.before.passed
        if not broken.any() or (is_open & ~broken).any():
            return not is_open.any()
        return not self.problem.excess(self.after, broken)

    def _new_active_set(self) -> ActiveSet:
        holds = self.retreats < HOLDING_STARTS
        return ActiveSet(self.problem, self.state, self.after, self.targets.insisted, holds_repairs=holds)

    def _new_descent(self) -> Descent:
        return Descent(self.problem, self.state, partial(torch.optim.Adam, lr=POLISH_RATE), self.masks)

    def _renew_rounds(self) -> None:
        self._rounds_left, self._fewest_open = MAX_STALLED_ROUNDS, math.inf

    def _keep(self, state: State) -> bool:
        """Takes weights that keep within the gate as a result; whether they are the best so far."""
        found = PolishResult.counted(self.problem, state, self.after, self.rounds, RETREAT_FACTOR**self.retreats)
        is_better = self.best is None or found.gain > self.best.gain
        self.best = better_of(self.best, found)
        return is_better

    def _count(self, state: State) -> SampleResults:
        """What the model does on all known data under a state; how long that took is kept."""
        began = self._deadline.now()
        after = self.problem.evaluate(state)
        self.course.append(self.problem.target_counts(after))
        self._one_pass = self._deadline.now() - began
        return after


BISECTIONS = 6
"""Halvings of the way, by what is known to be broken."""
MAX_COUNTS = 6
"""Counts of all known samples, each of which may show others that are broken there."""


@dataclass(frozen=True)
class PolishResult(Proposal):
    """Weights that break nothing: the given ones and, where steps were made, all parameters of the scope.

    Attributes:
        rounds: of steps that were made.
        strength: 1 if the steps sufficed; else how far from the original weights (0) to the last ones (1) it went back.
        course: what became of the known samples, each time that all were counted.
    """

    rounds: int = 0
    strength: float = 1.0
    course: tuple[TargetCounts, ...] = ()

    @classmethod
    def counted(
        cls, problem: Problem, state: State, after: SampleResults, rounds: int, strength: float = 1.0
    ) -> PolishResult:
        return cls(**vars(problem.counted("polish", state, after)), rounds=rounds, strength=strength)

    @property
    def note(self) -> str:
        back = f", then back to {self.strength:.0%} of the way" if self.strength < 1 else ""
        return f"{self.rounds} round{'' if self.rounds == 1 else 's'}{back}"


def better_of(best: PolishResult | None, other: PolishResult) -> PolishResult:
    """The one whose repairs are worth more, of equals the first; both break nothing."""
    return other if best is None or other.gain > best.gain else best


def scale_back(problem: Problem, active_set: ActiveSet, state: State, rounds: int, deadline: Deadline) -> PolishResult:
    """The furthest of some states between the original weights and these that breaks no more than the gate allows.

    What is broken says by bisection how far to go back. Then all known samples are counted; what else is broken there
    has a say in the next bisection. Where that does not end, or time is over after the first count, it is the original
    weights. The active set has the margins under the given state; after the deadline one more state is counted.
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
        if not active_set.broken.any() or not problem.excess(after, active_set.broken):
            return PolishResult.counted(problem, scaled, after, rounds, strength)
        rows = torch.cat([rows, active_set.broken.nonzero().flatten()]).unique()
    return PolishResult.counted(problem, between(original, state, 0.0), problem.before, rounds, 0.0)
