"""One large dual: proximal steps, each solved by a semismooth Newton method.

K is singular where there are more rows than unknowns. So the dual is solved in proximal steps, each beside the last
(Rockafellar 1976), and each of those by a semismooth Newton method with an exact line search (Li, Sun and Toh 2018): it
finds out which multipliers are strictly between their bounds and solves for those by Cholesky.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl._utils.interrupts import poll

__all__ = ["solve_one"]

CONDITIONS_TOLERANCE = 1e-7
"""Greatest violation of a solution's conditions, in parts of what the rows require: far below what a logit resolves."""

PROXIMAL_WEIGHT, PROXIMAL_DECAY, MIN_PROXIMAL_WEIGHT = 0.1, 0.3, 1e-6
"""Weight of the proximal term beside rows of norm 1, and what it is multiplied with from step to step, down to a least.
Large at first, so that few multipliers change sides at once; least as a Cholesky factor in float64 allows."""

MAX_PROXIMAL_STEPS, MAX_NEWTON_STEPS, MAX_STALLED_STEPS = 60, 400, 10
"""On proximal steps, on all Newton steps, on those in a row that bring one no nearer. Programmes of 200 to 1,500 rows
take 5 to 10 and 20 to 60; only multipliers a million times as large as others need more."""

CONTRADICTION_RATIO = 1e6
"""Hard rows contradict each other if only an x that is so many times as long as one row needs could fulfil them all."""


def solve_one(
    gram: Tensor, required: Tensor, limit: Tensor, start: Tensor, is_over: Callable[[], bool] = lambda: False
) -> tuple[Tensor, bool, bool]:
    """Multipliers, whether they are a solution to rounding, and whether the hard rows can be fulfilled.

    Args:
        gram: `m x m`, float64.
        required: `m`.
        limit: `m`, from 0; infinite for a hard row.
        start: `m`.
        is_over: asked before each Newton step whether time is over; then the best so far is given.
    """
    if not len(required):
        return required, True, True
    # Rows of norm 1, so that one tolerance and one proximal weight suit them all. A row of zeros stays one.
    norm = gram.diagonal().clamp_min(0).sqrt()
    norm = torch.where(norm > 1e-12 * norm.amax(), norm, 1)
    box = _Box(gram / norm / norm[:, None], required / norm, limit * norm)
    values, is_solved, is_feasible = _proximal(box, box.project(start * norm), is_over)
    return values / norm, is_solved, is_feasible


@dataclass(frozen=True)
class _Box:
    """min 1/2 a' K a - b' a so that 0 <= a <= limit."""

    gram: Tensor
    required: Tensor
    limit: Tensor

    def project(self, values: Tensor) -> Tensor:
        return values.clamp_min(0).minimum(self.limit)

    def residual(self, values: Tensor) -> float:
        """By how much the conditions of a solution are violated, in units of `required`."""
        gradient = self.gram @ values - self.required
        at_bound = ((values <= 0) & (gradient > 0)) | ((values >= self.limit) & (gradient < 0))
        return float(gradient.masked_fill(at_bound, 0).abs().amax())

    def is_contradictory(self, change: Tensor) -> bool:
        """Whether multipliers that grow without end prove hard rows contradictory (Farkas).

        With d >= 0 on hard rows, any x that fulfils them has |A' d| |x| >= d' A x >= d' required.
        """
        d = torch.where(self.limit.isinf(), change.clamp_min(0), 0)
        needed = float(self.required @ d)
        given = math.sqrt(max(float(d @ self.gram @ d), 0.0))
        return needed > CONTRADICTION_RATIO * given * max(float(self.required.abs().amax()), 1e-30)


def _proximal(box: _Box, values: Tensor, is_over: Callable[[], bool]) -> tuple[Tensor, bool, bool]:
    """Each step solves the dual plus a distance from where the step before ended, which weighs less and less."""
    scale = max(float(box.required.abs().amax()), 1e-30)
    best, least, weight, steps_left = values, box.residual(values), PROXIMAL_WEIGHT, MAX_NEWTON_STEPS
    wanted = 0.1 * scale
    for _ in range(MAX_PROXIMAL_STEPS):
        if least <= CONDITIONS_TOLERANCE * scale or steps_left <= 0 or is_over():
            break
        before = values
        wanted = max(wanted * 0.1, 0.5 * CONDITIONS_TOLERANCE * scale)
        values, made = _newton(box, values, weight, wanted, steps_left, is_over)
        steps_left -= made
        residual = box.residual(values)
        if residual < least:
            best, least = values, residual
        if box.is_contradictory(values - before):
            return values, False, False
        weight = max(weight * PROXIMAL_DECAY, MIN_PROXIMAL_WEIGHT)
    return best, least <= CONDITIONS_TOLERANCE * scale, True


def _newton(
    box: _Box, centre: Tensor, weight: float, wanted: float, max_steps: int, is_over: Callable[[], bool]
) -> tuple[Tensor, int]:
    """One proximal step: the minimum over x = A' z of 1/2 |x|^2 plus a smooth, piecewise quadratic penalty.

    Its gradient is A' (z - a), where a are the multipliers that the penalty gives at x.
    """
    gram, z = box.gram, centre
    least, stalled = torch.inf, 0
    for step in range(max_steps):
        poll()
        given = gram @ z
        raw = centre + (box.required - given) / weight
        a = box.project(raw)
        off = given - gram @ a
        size = float(off.abs().amax())
        stalled = 0 if size < 0.5 * least else stalled + 1
        least = min(least, size)
        if size <= wanted or stalled > MAX_STALLED_STEPS or is_over():
            return a, step
        direction = a - z
        free = ((raw > 0) & (raw < box.limit)).nonzero().flatten()
        if len(free):
            inner = gram[free][:, free]
            right = off[free] + (inner @ direction[free]) + weight * direction[free]
            inner.diagonal().add_(weight)
            direction[free] = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(inner))[:, 0]
        z = z + _line_search(box, centre, weight, z, given, direction) * direction
    return box.project(centre + (box.required - gram @ z) / weight), max_steps


def _line_search(box: _Box, centre: Tensor, weight: float, z: Tensor, given: Tensor, direction: Tensor) -> float:
    """How far to go, at most once the direction: where the slope along it, which only rises, is 0."""
    along = box.gram @ direction

    def slope(t: float) -> float:
        a = box.project(centre + (box.required - given - t * along) / weight)
        return float(along @ (z + t * direction - a))

    low, high = 0.0, 1.0
    if slope(high) <= 0:
        return high
    while high - low > 1e-3 * high and high > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return (low + high) / 2
