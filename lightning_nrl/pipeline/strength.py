"""Chooses the strength of a patch.

The weights at strength t are w0 + t (w - w0), with the original weights w0 and the patch's weights
w. t may exceed 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lightning_nrl._utils.state import State, between, current_state
from lightning_nrl.evaluation import FlipCounts, Flips, SampleResults
from lightning_nrl.evaluation.stats import Selection
from lightning_nrl.gate import Gate
from lightning_nrl.methods import Problem
from lightning_nrl.methods.budget import MAX_POLISHES
from lightning_nrl.methods.solvers.polish import polish
from lightning_nrl.pipeline.baseline import EvaluatedData
from lightning_nrl.records import StrengthPoint

# The most informative first.
PATH_STRENGTHS: tuple[float, ...] = (1.0, 1.15, 0.6, 0.8, 0.4, 0.2, 1.3)


@dataclass
class PatchPath:
    """Counts what a patch repairs and breaks at several strengths, on known and calibration data.

    A patch that breaks nothing at strength 1 may break samples at a lower strength. Then `take`
    polishes the weights: it takes small steps until these samples are right again, if `may_polish`
    is True. `counted` has the counts by strength; for polished weights, those after the polish.
    `broken_unpolished` counts broken calibration samples before any polish.
    """

    problem: Problem
    patch: State
    gate: Gate = field(default_factory=Gate.instance)
    calibration: EvaluatedData | None = None
    may_polish: bool = False
    counted: dict[float, StrengthPoint] = field(default_factory=dict)
    broken_unpolished: dict[float, int] = field(default_factory=dict)

    @property
    def points(self) -> tuple[StrengthPoint, ...]:
        return tuple(self.counted[strength] for strength in sorted(self.counted))

    @property
    def curve(self) -> tuple[StrengthPoint, ...]:
        """The points, or none if only strength 1 was counted."""
        return self.points if self.counted.keys() != {1.0} else ()

    def state(self, strength: float) -> State:
        return between(current_state(self.problem.model), self.patch, strength)

    def count(
        self, strengths: Iterable[float], *, after: SampleResults | None = None
    ) -> tuple[StrengthPoint, ...]:
        """Evaluates the patch at several strengths in turn, and returns all points counted so far.

        If a strength above 1 violates the gate, greater strengths are skipped. If time is short,
        only the first strength is certain to be evaluated. `after` has the results on known data at
        strength 1, if they are available.
        """
        clock, seconds, strongest = self.problem.clock, 0.0, math.inf
        if after is not None:
            self.point(1.0, after)
        for number, strength in enumerate(strengths):
            if number and not self.leaves_time_for(seconds):
                break
            if strength > strongest:
                continue
            began = clock.now()
            point = self.point(strength)
            seconds = max(clock.now() - began, clock.one_pass)
            if strength > 1 and not self.within_gate(point):
                strongest = strength
        return self.points

    def point(self, strength: float, after: SampleResults | None = None) -> StrengthPoint:
        if strength not in self.counted:
            point = self._count(strength, self.state(strength), after)
            self.counted[strength] = point
            if point.calibration is not None:
                self.broken_unpolished[strength] = point.calibration.broken
        return self.counted[strength]

    def take(self, strength: float) -> State:
        """Returns the weights at a strength.

        Below 1, it polishes weights that violate the gate, if it may.
        """
        state = self.state(strength)
        if strength < 1 and not self.within_gate(self.point(strength)) and self.may_polish:
            try:
                result = polish(self.problem, state, deadline=self.problem.deadline)
            except Exception as error:
                self.problem.go_on_after(error, "strength")
                return state
            state = result.state
            point = self._count(strength, state, result.after)
            self.counted[strength] = replace(point, polished=True)
        return state

    def count_broken_unpolished(self, strength: float) -> int:
        assert self.calibration is not None
        if strength not in self.broken_unpolished:
            flips = self.calibration.flips(self.problem.evaluator, self.state(strength))
            self.broken_unpolished[strength] = flips.counts().broken
        return self.broken_unpolished[strength]

    def within_gate(self, point: StrengthPoint) -> bool:
        return not self.gate.excess_of(point.known, point.cost_of_known)

    def within_limit(self, strength: float, limit: Gate) -> bool:
        """True if the patch keeps the limit on calibration data and the gate on known data.

        Below strength 1 the gate is ignored if `take` may polish, because the polish may still
        satisfy it.
        """
        point = self.point(strength)
        assert point.calibration is not None
        if not self.within_gate(point) and (strength >= 1 or not self.may_polish):
            return False
        return not limit.excess_of(point.calibration, point.cost_of_calibration)

    def takes_time(self, strength: float) -> bool:
        """True if `take` must evaluate the model or polish for this strength."""
        if strength not in self.counted:
            return True
        return strength < 1 and not self.within_gate(self.counted[strength])

    def leaves_time_for(self, seconds: float) -> bool:
        """True if every rank has time for work of this duration and a pass over the data."""
        return self.problem.deadline.leaves(seconds + self.problem.clock.one_pass)

    def _count(
        self, strength: float, state: State, after: SampleResults | None = None
    ) -> StrengthPoint:
        before = self.problem.before
        if after is None:
            after = self.problem.evaluate(state)
        flips = Flips.between(before, after)
        repaired = flips.repaired & before.targeted
        point = StrengthPoint(strength, int(repaired.sum()), flips.counts())
        cost = self.gate.cost(before, flips.broken)
        if before.weighted:
            point = replace(point, value=before.value(repaired))
        if before.weighted or cost != point.known.broken:
            point = replace(point, cost=cost)
        if self.calibration is None:
            return point
        flips = self.calibration.flips(self.problem.evaluator, state)
        point = replace(point, calibration=flips.counts())
        if self.calibration.before.weighted:
            point = replace(point, calibration_cost=self.calibration.before.cost(flips.broken))
        return point


# Strengths to try under a limit.
LIMIT_STRENGTHS = tuple(step / 20 for step in range(1, 27))
# Sets of weights that calibration data may choose under a limit: one per strength and, below 1, a
# polished one, too.
LIMIT_STATES = len(LIMIT_STRENGTHS) + sum(strength < 1 for strength in LIMIT_STRENGTHS)


@dataclass(frozen=True)
class LineSearchResult:
    """The `chosen` strength, or None if no strength keeps the limit.

    `path` has the counts at each tried strength, or nothing if only strength 1 was tried. `state`
    has each changed tensor at the chosen strength. `selection` says how calibration data chose this
    strength.
    """

    path: tuple[StrengthPoint, ...] = ()
    chosen: float | None = 1.0
    state: State = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)


def line_search(
    problem: Problem,
    patch: State,
    gate: Gate,
    *,
    calibration: EvaluatedData | None = None,
    fixed: float | None = None,
    limit: Gate | None = None,
    after: SampleResults | None = None,
    may_polish: bool = True,
) -> LineSearchResult:
    """Evaluates a patch at several strengths and chooses one, by default with `choose_strength`.

    Without calibration data, strengths other than `fixed` and 1 are only evaluated if that needs no
    passes. If `fixed` is given, this strength is chosen. `limit` is a limit on broken calibration
    samples. If it is given, the greatest strength in `LIMIT_STRENGTHS` is chosen whose weights keep
    the limit and the gate, if necessary after a polish. `after` has the results on known data with
    the patch, if they are available.
    """
    has_margins = problem.before.has_margins  # without them there is no polish
    path = PatchPath(problem, patch, gate, calibration, may_polish and has_margins)
    strengths = PATH_STRENGTHS
    if calibration is None and not problem.record.covers_path(problem.model, patch):
        # Without calibration data the points are only reported, which is worth no pass.
        strengths = (1.0,)
    if fixed is not None:
        strengths = (fixed, *strengths)
    points = path.count(dict.fromkeys(strengths), after=after)
    if limit is None and fixed is None and math.isinf(_whole_patch(points).cost_of_calibration):
        # The patch breaks protected calibration samples. This limit allows any broken samples but
        # these.
        limit = Gate.tolerance(1.0)
    if limit is not None and calibration is not None:
        return _strongest_within(path, limit)
    if fixed is not None:
        state = path.take(fixed)
        return LineSearchResult(path.curve, fixed, state)
    selection = Selection(1 + len(_free(points)))
    if calibration is not None and calibration.before.weighted:
        # With protected samples the data decide which weights are tried, so all that could be tried
        # count.
        selection = Selection(LIMIT_STATES)
    strength = choose_strength(points)
    state = path.take(strength)
    return LineSearchResult(path.curve, strength, state, selection)


def choose_strength(path: Sequence[StrengthPoint]) -> float:
    """Returns the strength to take by default: 1, or a greater one that repairs more at no cost.

    At no cost means that no known sample breaks, and no more calibration samples break than at
    strength 1.
    """
    chosen = _whole_patch(path)
    for point in _free(path):
        is_better = point.value_of_repairs > chosen.value_of_repairs
        if is_better and point.cost_of_calibration <= chosen.cost_of_calibration:
            chosen = point
    return chosen.strength


def _free(path: Sequence[StrengthPoint]) -> list[StrengthPoint]:
    """Returns the points above strength 1 that repair more than it and break no known sample."""
    patch = _whole_patch(path)
    free: list[StrengthPoint] = []
    if patch.calibration is None:
        return free
    for point in path:
        is_better = point.value_of_repairs > patch.value_of_repairs
        if point.strength > 1 and not point.known.broken and is_better:
            free.append(point)
    return free


def _whole_patch(path: Sequence[StrengthPoint]) -> StrengthPoint:
    return next(point for point in path if point.strength == 1)


def _strongest_within(path: PatchPath, limit: Gate) -> LineSearchResult:
    clock, seconds, n_polished = path.problem.clock, 0.0, 0
    for strength in _from_strong_to_weak(path, limit):
        may_polish = n_polished < MAX_POLISHES and path.leaves_time_for(seconds)
        if path.takes_time(strength) and not may_polish:
            continue
        began = clock.now()
        if path.within_limit(strength, limit):
            state = path.take(strength)
            point = path.counted[strength]
            if point.polished:
                n_polished += 1
            if path.within_limit(strength, limit) and path.within_gate(point):
                selection = _selection(path, strength, limit)
                return LineSearchResult(path.points, strength, state, selection)
        seconds = clock.now() - began
    return LineSearchResult(path.points, None)


def _from_strong_to_weak(path: PatchPath, limit: Gate) -> list[float]:
    """Returns the strengths to try under a limit, below the weakest counted one that breaks it."""
    low = max((t for t in path.counted if path.within_limit(t, limit)), default=0.0)
    high = min((t for t in path.counted if t > low), default=low)
    strengths = [t for t in LIMIT_STRENGTHS if t <= low or t < high]
    if low and low not in strengths:
        strengths.append(low)
    return sorted(strengths, reverse=True)


def _selection(path: PatchPath, strength: float, limit: Gate) -> Selection:
    """Returns how calibration data chose a strength under a limit, for the bound on future errors.

    The search goes from strong to weak, to save time. If all weaker strengths keep the limit too, a
    walk from weak to strong would also have accepted this strength. Then the tighter bound of such
    a walk holds: its order (`LIMIT_STRENGTHS`) and the number of samples that may break were fixed
    in advance.
    """
    allowed = _fixed_allowance(path, limit)
    if allowed is None:
        return Selection(LIMIT_STATES)
    if path.counted[strength].polished or not _walk_accepts(path, strength, allowed):
        return Selection(LIMIT_STATES, ordered=True)
    return Selection(LIMIT_STATES, ordered=True, allowed=allowed)


def _walk_accepts(path: PatchPath, strength: float, allowed: int) -> bool:
    """True if no strength up to `strength` breaks more than `allowed` calibration samples.

    False if time is short.
    """
    clock, seconds = path.problem.clock, 0.0
    for weaker in LIMIT_STRENGTHS:
        if weaker > strength:
            break
        is_counted = weaker in path.broken_unpolished
        if not is_counted and not path.leaves_time_for(seconds):
            return False
        began = clock.now()
        if path.count_broken_unpolished(weaker) > allowed:
            return False
        if not is_counted:
            seconds = clock.now() - began
    return True


def _fixed_allowance(path: PatchPath, limit: Gate) -> int | None:
    """Returns how many calibration samples may break.

    None if the number depends on the repair, or if all may break.
    """
    assert path.calibration is not None
    before = path.calibration.before
    unchanged = Flips.between(before, before).counts()
    best = FlipCounts(unchanged.kept, 0, unchanged.failing, 0)
    worst = FlipCounts(0, unchanged.kept, 0, unchanged.failing)
    allowed = limit.allowed(best)
    if allowed != limit.allowed(worst) or allowed >= unchanged.kept:
        return None
    return allowed
