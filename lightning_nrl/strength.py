"""How far to go: every candidate is a path from the original weights (t = 0) to the patch (t = 1), and a little beyond.

Each point of it is counted by real forward passes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_nrl.batches import Source
from lightning_nrl.evidence import Evidence, collect
from lightning_nrl.flips import FlipCounts, Flips
from lightning_nrl.gate import Gate
from lightning_nrl.methods.problem import Problem
from lightning_nrl.state import State, between, holding

__all__ = ["POINTS", "Calibration", "Strength", "StrengthPoint", "choose", "find_strength", "strength_path"]

POINTS = (1.0, 1.15, 0.6, 0.8, 0.4, 0.2, 1.3)
"""Strengths to be counted, the most telling first, since time may be short."""

GRID = tuple(step / 20 for step in range(1, 27))
"""Strengths among which the strongest under a limit is sought, 0.05 to 1.3."""


@dataclass(frozen=True)
class StrengthPoint:
    """What a patch does at one strength.

    Attributes:
        strength: t, 0 for the original weights and 1 for the patch.
        repaired_in_target: targeted samples that pass.
        known: what becomes of all known samples.
        calibration: what becomes of the calibration data; None if there are none.
    """

    strength: float
    repaired_in_target: int
    known: FlipCounts
    calibration: FlipCounts | None = None


@dataclass(frozen=True)
class Calibration:
    """Data that no search looks at, to choose the strength by.

    Attributes:
        sources: this rank's share of them.
        before: what the original model does on them.
    """

    sources: Sequence[Source]
    before: Evidence


@dataclass(frozen=True)
class Strength:
    """How far a repair goes.

    Attributes:
        path: the strengths that were counted, ascending.
        chosen: the one to take; None if none keeps within the limit.
    """

    path: tuple[StrengthPoint, ...] = ()
    chosen: float | None = 1.0


def find_strength(
    problem: Problem,
    state: State,
    gate: Gate,
    *,
    calibration: Calibration | None = None,
    fixed: float | None = None,
    limit: Gate | None = None,
) -> Strength:
    """Counts a patch along its path and says how far to go: see `choose` for the default.

    Args:
        problem: what is to be repaired.
        state: the patch; whole tensors.
        gate: how many known samples may break.
        calibration: data to choose by; needed for a limit.
        fixed: the strength to take, whatever is found.
        limit: how many calibration samples may break at most. The strongest of `GRID` that keeps within it and within
            the gate is taken.
    """
    points = POINTS if fixed is None or fixed in POINTS else (fixed, *POINTS)
    path = strength_path(problem, state, points, calibration=calibration, gate=gate)
    if fixed is not None:
        return Strength(path, fixed)
    if limit is None or calibration is None:
        return Strength(path, choose(path))
    return _strongest(problem, state, path, gate, limit, calibration)


def strength_path(
    problem: Problem,
    state: State,
    points: Iterable[float] = POINTS,
    *,
    calibration: Calibration | None = None,
    gate: Gate | None = None,
) -> tuple[StrengthPoint, ...]:
    """Counts a patch at several strengths, each by one forward pass over known and calibration data.

    Args:
        problem: what is to be repaired.
        state: the patch; whole tensors.
        points: strengths, the most telling first. Of those beyond 1, none above the first one that breaks more than the
            gate allows; the last ones are left out where time is short, but not the first.
        calibration: data that are counted too.
        gate: how many known samples may break; None: none beyond 1.

    Returns:
        The points that were counted, ascending; the same on every rank.
    """
    allows = gate or Gate.instance()
    found: list[StrengthPoint] = []
    took, most = 0.0, float("inf")
    for strength in points:
        if found and _short_of_time(problem, took):
            break
        if strength > most:
            continue
        began = time.perf_counter()
        point = _count(problem, state, strength, calibration)
        took = time.perf_counter() - began
        found.append(point)
        if strength > 1 and point.known.broken > allows.allowed(point.known):
            most = min(most, strength)
    return tuple(sorted(found, key=lambda point: point.strength))


def choose(path: Sequence[StrengthPoint]) -> float:
    """The strength to take if nobody says: that of the patch, 1, or one beyond it of which data say that it is free.

    One is free if it breaks no known sample, repairs more of the target, and breaks no more calibration samples. None is
    without these: what is free on known data was costly on unseen data wherever it was tried.
    """
    chosen = next((point for point in path if point.strength == 1), None)
    if chosen is None:
        return 1.0
    for point in path:
        here, there = chosen.calibration, point.calibration
        if point.strength <= chosen.strength or point.known.broken or here is None or there is None:
            continue
        if there.broken <= here.broken and point.repaired_in_target > chosen.repaired_in_target:
            chosen = point
    return chosen.strength


def _strongest(
    problem: Problem, state: State, path: Sequence[StrengthPoint], gate: Gate, limit: Gate, calibration: Calibration
) -> Strength:
    """Looks between the strongest point that keeps within the limit and the next one, on a finer grid."""

    def keeps(point: StrengthPoint) -> bool:
        assert point.calibration is not None
        known = point.known.broken <= gate.allowed(point.known)
        return known and point.calibration.broken <= limit.allowed(point.calibration)

    seen = {point.strength: point for point in path}
    low = max((strength for strength, point in seen.items() if keeps(point)), default=0.0)
    high = min((strength for strength in seen if strength > low), default=low)
    took = 0.0
    for strength in reversed([strength for strength in GRID if low < strength < high]):
        if _short_of_time(problem, took):
            break
        began = time.perf_counter()
        seen[strength] = _count(problem, state, strength, calibration)
        took = time.perf_counter() - began
        if keeps(seen[strength]):
            low = strength
            break
    return Strength(tuple(seen[strength] for strength in sorted(seen)), low or None)


def _count(problem: Problem, state: State, strength: float, calibration: Calibration | None) -> StrengthPoint:
    old = problem.model.state_dict()
    new = between(old, state, strength)
    flips = Flips.between(problem.before, problem.see(new))
    aside = None
    if calibration is not None:
        with holding(problem.model, new):
            after = collect(
                problem.model,
                calibration.sources,
                task=problem.task,
                context=problem.context,
                collective=problem.collective,
            )
        aside = Flips.between(calibration.before, after).counts()
    repaired = int((flips.repaired & problem.before.targeted).sum())
    return StrengthPoint(strength, repaired, flips.counts(), aside)


def _short_of_time(problem: Problem, took: float) -> bool:
    """Whether another point, and the recount that follows, would take longer than is left; the same on every rank."""
    if problem.clock.left == float("inf"):
        return False
    return problem.collective.any(problem.clock.left < took + problem.clock.seconds.get("collect", 0.0))
