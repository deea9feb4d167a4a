"""How far to go: every candidate is a path from the original weights (t = 0) to the patch (t = 1), and a little beyond.

Each point of it is counted by real forward passes. A patch that breaks nothing at its end may break something half way:
a point that is taken there is polished first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lightning_nrl._optim.polish import polish
from lightning_nrl._utils.state import State, between
from lightning_nrl.data.batch import Source
from lightning_nrl.evaluation.flips import FlipCounts, Flips
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.gate import Gate
from lightning_nrl.problem import Problem
from lightning_nrl.report import StrengthPoint
from lightning_nrl.stats.post_selection import Selection

__all__ = ["POINTS", "Calibration", "Strength", "choose", "find_strength", "strength_path"]

POINTS = (1.0, 1.15, 0.6, 0.8, 0.4, 0.2, 1.3)
"""Strengths to be counted, the most telling first, since time may be short."""

GRID = tuple(step / 20 for step in range(1, 27))
"""Strengths among which the strongest under a limit is sought, 0.05 to 1.3."""

STATES = len(GRID) + sum(t < 1 for t in GRID)
"""Sets of weights that calibration data might choose under a limit: at each strength, before the patch polished too."""

SHARE = 0.1
"""Points that decide nothing, as none does without calibration data, are counted for this part of the time that the
repair took before them."""

FEW = 4096
"""So few known samples are counted at all points, however long that takes: the report is the same each time."""

POLISHES = 3
"""Polishes at most in the search for the strongest: each may break calibration samples that were not broken before."""


@dataclass(frozen=True)
class Calibration:
    """Data that no search looks at, to choose the strength by.

    Attributes:
        sources: this rank's share of them.
        before: what the original model does on them.
    """

    sources: Sequence[Source]
    before: SampleResults


@dataclass(frozen=True)
class Strength:
    """How far a repair goes.

    Attributes:
        path: the strengths that were counted, ascending.
        chosen: the one to take; None if none keeps within the limit.
        state: the weights there, whole tensors.
        selection: what say calibration data had in that.
    """

    path: tuple[StrengthPoint, ...] = ()
    chosen: float | None = 1.0
    state: State = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)


def find_strength(
    problem: Problem,
    state: State,
    gate: Gate,
    *,
    calibration: Calibration | None = None,
    fixed: float | None = None,
    limit: Gate | None = None,
    after: SampleResults | None = None,
) -> Strength:
    """Counts a patch along its path and says how far to go: see `choose` for the default.

    Args:
        problem: what is to be repaired.
        state: the patch; whole tensors.
        gate: how many known samples may break.
        calibration: data to choose by; needed for a limit.
        fixed: the strength to take, whatever is found.
        limit: how many calibration samples may break at most. The strongest of `GRID` that keeps within it and within
            the gate, once it is polished, is taken.
        after: what the model does on known data under the patch, if that is known already.
    """
    points: tuple[float, ...] = POINTS if fixed is None or fixed in POINTS else (fixed, *POINTS)
    seconds = math.inf
    if calibration is None:
        # Nothing is decided: what the patch does on the way to it comes first.
        points = tuple(sorted(points, key=lambda strength: (strength != fixed, strength > 1)))
        seconds = SHARE * problem.clock.elapsed if len(problem.before) > FEW else math.inf
    path = strength_path(problem, state, points, calibration=calibration, gate=gate, after=after, seconds=seconds)
    way = _Way(problem, state, gate, calibration, {point.strength: point for point in path})
    if limit is None and fixed is None and any(point.strength == 1 and math.isinf(point.cost_aside) for point in path):
        # Anything may break but what is protected.
        limit = Gate.tolerance(1.0)
    if limit is not None and calibration is not None:
        return way.strongest(limit)
    if fixed is not None:
        return way.taken(fixed)
    # Whether something protected breaks there decides what is looked at.
    states = STATES if calibration is not None and calibration.before.weighted else 1 + len(_free(path))
    return replace(way.taken(choose(path)), selection=Selection(states))


def strength_path(
    problem: Problem,
    state: State,
    points: Iterable[float] = POINTS,
    *,
    calibration: Calibration | None = None,
    gate: Gate | None = None,
    after: SampleResults | None = None,
    seconds: float = math.inf,
) -> tuple[StrengthPoint, ...]:
    """Counts a patch at several strengths, each by one forward pass over known and calibration data.

    Args:
        problem: what is to be repaired.
        state: the patch; whole tensors.
        points: strengths, the most telling first. Of those beyond 1, none above the first one that breaks more than the
            gate allows; the last ones are left out where time is short, but not the first.
        calibration: data that are counted too.
        gate: how many known samples may break; None: none beyond 1.
        after: what the model does on known data at 1, if that is known already.
        seconds: after which no further point is begun; the first is counted anyway.

    Returns:
        The points that were counted, ascending; the same on every rank.
    """
    allows = gate or Gate.instance()
    found: list[StrengthPoint] = []
    took, most, start = 0.0, math.inf, time.perf_counter()
    for strength in points:
        if found and (_short_of_time(problem, took) or _is_over(problem, time.perf_counter() - start, seconds)):
            break
        if strength > most:
            continue
        began = time.perf_counter()
        tried, seen = between(problem.model.state_dict(), state, strength), after if strength == 1 else None
        point = _count(problem, tried, strength, calibration, seen)
        took = max(time.perf_counter() - began, problem.clock.one_pass if seen is not None else 0.0)
        found.append(point)
        if strength > 1 and point.cost > allows.allowed(point.known):
            most = min(most, strength)
    return tuple(sorted(found, key=lambda point: point.strength))


def choose(path: Sequence[StrengthPoint]) -> float:
    """The strength to take if nobody says: that of the patch, 1, or one beyond it of which data say that it is free.

    One is free if it breaks no known sample, repairs more of the target, and breaks no more calibration samples. None
    is without these: what is free on known data was costly on unseen data, wherever it was tried.
    """
    chosen = next((point for point in path if point.strength == 1), None)
    if chosen is None:
        return 1.0
    for point in _free(path):
        here, there = chosen.calibration, point.calibration
        if here is None or there is None:
            continue
        if point.cost_aside <= chosen.cost_aside and point.worth > chosen.worth:
            chosen = point
    return chosen.strength


def _free(path: Sequence[StrengthPoint]) -> list[StrengthPoint]:
    """Points beyond the patch that are better than it on known data; calibration data have the last word on them."""
    patch = next((point for point in path if point.strength == 1), None)
    if patch is None or patch.calibration is None:
        return []
    return [point for point in path if point.strength > 1 and not point.known.broken and point.worth > patch.worth]


@dataclass
class _Way:
    """The way to a patch, and what was seen of it so far, by strength."""

    problem: Problem
    patch: State
    gate: Gate
    calibration: Calibration | None
    seen: dict[float, StrengthPoint]
    unpolished: dict[float, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._note(self.seen)

    def taken(self, strength: float) -> Strength:
        """The state at a strength, polished if it lies before the patch and breaks more than the gate allows."""
        state: State = between(self.problem.model.state_dict(), self.patch, strength)
        if strength < 1 and not self._allowed(self._point(strength)) and self._has_margins():
            state = polish(self.problem, state, seconds=self.problem.clock.left).state
            point = _count(self.problem, state, strength, self.calibration)
            self.seen[strength] = replace(point, polished=True)
        path = tuple(self.seen[strength] for strength in sorted(self.seen))
        return Strength(path, strength, state)

    def strongest(self, limit: Gate) -> Strength:
        """Looks between the strongest point that keeps within the limit and the next one, on a finer grid."""
        low = max((t for t in self.seen if self._keeps(t, limit)), default=0.0)
        high = min((t for t in self.seen if t > low), default=low)
        finer = [t for t in reversed(GRID) if low < t < high]
        weaker = [t for t in reversed(GRID) if t <= low]
        took, polished = 0.0, 0
        for strength in (*finer, *([low] if low and low not in weaker else []), *weaker):
            if self._is_work(strength) and (polished == POLISHES or _short_of_time(self.problem, took)):
                continue
            began = time.perf_counter()
            if self._keeps(strength, limit):
                found = self.taken(strength)
                polished += self.seen[strength].polished
                if self._keeps(strength, limit) and self._allowed(self.seen[strength]):
                    return replace(found, selection=self._selection(strength, limit))
            took = time.perf_counter() - began
        return Strength(tuple(self.seen[strength] for strength in sorted(self.seen)), None)

    def _point(self, strength: float) -> StrengthPoint:
        if strength not in self.seen:
            state = between(self.problem.model.state_dict(), self.patch, strength)
            self.seen[strength] = _count(self.problem, state, strength, self.calibration)
            self._note({strength: self.seen[strength]})
        return self.seen[strength]

    def _note(self, points: Mapping[float, StrengthPoint]) -> None:
        """Calibration samples that break at a strength before anything is polished there."""
        self.unpolished |= {t: p.calibration.broken for t, p in points.items() if p.calibration is not None}

    def _selection(self, strength: float, limit: Gate) -> Selection:
        """What say calibration data had in a strength that was found under a limit.

        It was sought from strong to weak, which costs least. If all weaker strengths keep within the limit too, it is
        also one that a walk from weak to strong accepts, and what is said of those holds: the order of `GRID` and the
        number of samples that may break are fixed before anything is counted.
        """
        allowed = self._fixed(limit)
        if allowed is not None and not self.seen[strength].polished and self._walks(strength, allowed):
            return Selection(STATES, True, allowed)
        return Selection(STATES, allowed is not None)

    def _walks(self, strength: float, allowed: int) -> bool:
        assert self.calibration is not None
        took = 0.0
        for weaker in (t for t in GRID if t <= strength):
            if weaker not in self.unpolished:
                if _short_of_time(self.problem, took):
                    return False
                began = time.perf_counter()
                state = between(self.problem.model.state_dict(), self.patch, weaker)
                self.unpolished[weaker] = _aside(self.problem, state, self.calibration).counts().broken
                took = time.perf_counter() - began
            if self.unpolished[weaker] > allowed:
                return False
        return True

    def _fixed(self, limit: Gate) -> int | None:
        """How many calibration samples may break, if not all and whatever becomes of them."""
        assert self.calibration is not None
        now = Flips.between(self.calibration.before, self.calibration.before).counts()
        best, worst = FlipCounts(now.kept, 0, now.failing, 0), FlipCounts(0, now.kept, 0, now.failing)
        allowed = limit.allowed(best)
        return allowed if allowed == limit.allowed(worst) and allowed < now.kept else None

    def _is_work(self, strength: float) -> bool:
        """Whether a strength has to be counted first, or polished."""
        return strength not in self.seen or (strength < 1 and not self._allowed(self.seen[strength]))

    def _keeps(self, strength: float, limit: Gate) -> bool:
        """Whether a strength keeps within the limit and, from the patch on, where nothing is polished, the gate."""
        point = self._point(strength)
        assert point.calibration is not None
        known = self._allowed(point) or (strength < 1 and self._has_margins())
        return known and point.cost_aside <= limit.allowed(point.calibration)

    def _allowed(self, point: StrengthPoint) -> bool:
        return point.cost <= self.gate.allowed(point.known)

    def _has_margins(self) -> bool:
        return not bool(self.problem.before.margin.isnan().all())


def _count(
    problem: Problem, state: State, strength: float, calibration: Calibration | None, after: SampleResults | None = None
) -> StrengthPoint:
    flips = Flips.between(problem.before, problem.evaluate(state) if after is None else after)
    later = None if calibration is None else _aside(problem, state, calibration)
    aside, harm_aside, before = None, None, problem.before
    if calibration is not None and later is not None:
        aside = later.counts()
        harm_aside = calibration.before.harm(later.broken) if calibration.before.weighted else None
    repaired = flips.repaired & before.targeted
    point = StrengthPoint(strength, int(repaired.sum()), flips.counts(), aside, harm_aside=harm_aside)
    if not before.weighted:
        return point
    return replace(point, gain=before.gain(repaired), harm=before.harm(flips.broken))


def _aside(problem: Problem, state: State, calibration: Calibration) -> Flips:
    """What becomes of calibration samples."""
    return Flips.between(calibration.before, problem.evaluator.run_with(state, calibration.sources))


def _is_over(problem: Problem, spent: float, seconds: float) -> bool:
    """Whether so many seconds are spent on any rank."""
    return math.isfinite(seconds) and problem.collective.any(spent >= seconds)


def _short_of_time(problem: Problem, took: float) -> bool:
    """Whether another point, and the recount that follows, would take longer than is left; the same on every rank."""
    if problem.clock.left == float("inf"):
        return False
    return problem.collective.any(problem.clock.left < took + problem.clock.one_pass)
