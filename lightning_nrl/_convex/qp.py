"""The smallest change that does what rows of a linear system ask: a quadratic programme, solved in its dual.

The programme is

    min over x, s >= 0   1/2 |x|^2 + sum_i limit_i * s_i     so that   A x + s >= asked,

where a row with an infinite limit is hard: its s is 0. Its dual has one multiplier a row and bounds alone,

    min over a   1/2 a' K a - asked' a     so that   0 <= a <= limit,     K = A A',

and x = A' a. K is singular where there are more rows than unknowns. So the dual is solved in proximal steps, each
beside the last (Rockafellar 1976), and each of those by a semismooth Newton method with an exact line search (Li, Sun
and Toh 2018): it finds out which multipliers are strictly between their bounds and solves for those by Cholesky.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl._utils.precision import widest

__all__ = ["Multipliers", "solve_dual"]

TOLERANCE = 1e-7
"""Greatest violation of a solution's conditions, in parts of what the rows ask: far below what a logit resolves."""

NEAR, NEARER, NEAREST = 0.1, 0.3, 1e-6
"""Weight of the proximal term beside rows of norm 1, and what it is multiplied with from step to step, down to a least.
Large at first, so that few multipliers change sides at once; least as a Cholesky factor in float64 allows."""

OUTER, STEPS, STALLED = 60, 400, 10
"""Limits: on proximal steps, on all Newton steps, on those in a row that bring one no nearer. Programmes of 200 to
1,500 rows take 5 to 10 and 20 to 60; only multipliers a million times as large as others need more."""

FAR = 1e6
"""Hard rows contradict each other if only an x that is so many times as long as one row needs could fulfil them all."""


@dataclass(frozen=True)
class Multipliers:
    """The solution of a dual.

    Attributes:
        values: `m`, one multiplier a row, from 0 to its limit. The change is x = A' values.
        slack: `m`, by how much each row gives more than was asked, K values - asked; below 0 where it gives less.
        solved: whether the conditions of a solution hold to rounding; if not, it is the best that was found.
        feasible: whether the hard rows can be fulfilled at once; if not, `values` means nothing.
        steps: Newton steps that were made.
    """

    values: Tensor
    slack: Tensor
    solved: bool
    feasible: bool
    steps: int


@torch.no_grad()
def solve_dual(gram: Tensor, asked: Tensor, limit: Tensor, start: Tensor | None = None) -> Multipliers:
    """Solves the dual.

    Args:
        gram: `m x m`, K = A A', products of the rows.
        asked: `m`, what each row must give at least.
        limit: `m`, from 0; infinite for a hard row.
        start: `m`, multipliers to begin with, such as those of a similar programme; None: 0.

    Returns:
        The solution, on the device of `gram` and in its dtype; computed in float64, on the CPU where the device has no
        such numbers.
    """
    device, dtype = gram.device, gram.dtype
    home = device if widest(device) == torch.float64 else torch.device("cpu")
    gram, asked, limit = (t.to(home, torch.float64) for t in (gram, asked, limit))
    if not len(asked):
        return Multipliers(asked.to(device, dtype), asked.to(device, dtype), True, True, 0)
    # Rows of norm 1, so that one tolerance and one proximity suit them all. A row of zeros stays one.
    norm = gram.diagonal().clamp_min(0).sqrt()
    norm = torch.where(norm > 1e-12 * norm.amax(), norm, 1)
    box = _Box(gram / norm / norm[:, None], asked / norm, limit * norm)
    values = torch.zeros_like(asked) if start is None else start.to(home, torch.float64) * norm
    values, solved, feasible, steps = _proximal(box, box.inside(values))
    values = values / norm
    slack = gram @ values - asked
    return Multipliers(values.to(device, dtype), slack.to(device, dtype), solved, feasible, steps)


@dataclass(frozen=True)
class _Box:
    """min 1/2 a' K a - b' a so that 0 <= a <= limit."""

    gram: Tensor
    asked: Tensor
    limit: Tensor

    def inside(self, values: Tensor) -> Tensor:
        return values.clamp_min(0).minimum(self.limit)

    def residual(self, values: Tensor) -> float:
        """By how much the conditions of a solution are violated, in units of `asked`."""
        slope = self.gram @ values - self.asked
        pressed = ((values <= 0) & (slope > 0)) | ((values >= self.limit) & (slope < 0))
        return float(slope.masked_fill(pressed, 0).abs().amax())


def _proximal(box: _Box, values: Tensor) -> tuple[Tensor, bool, bool, int]:
    """Each step solves the dual plus a distance from where the step before ended, which weighs less and less."""
    scale = max(float(box.asked.abs().amax()), 1e-30)
    best, least, near, left = values, box.residual(values), NEAR, STEPS
    wanted = 0.1 * scale
    for _ in range(OUTER):
        if least <= TOLERANCE * scale or left <= 0:
            break
        before = values
        wanted = max(wanted * 0.1, 0.5 * TOLERANCE * scale)
        values, made = _newton(box, values, near, wanted, left)
        left -= made
        residual = box.residual(values)
        if residual < least:
            best, least = values, residual
        if _contradictory(box, values - before):
            return values, False, False, STEPS - left
        near = max(near * NEARER, NEAREST)
    return best, least <= TOLERANCE * scale, True, STEPS - left


def _newton(box: _Box, centre: Tensor, near: float, wanted: float, most: int) -> tuple[Tensor, int]:
    """One proximal step: the minimum over x = A' z of 1/2 |x|^2 plus a smooth, piecewise quadratic penalty.

    Its gradient is A' (z - a), where a are the multipliers that the penalty gives at x.
    """
    gram, z = box.gram, centre
    least, stalled = torch.inf, 0
    for step in range(most):
        given = gram @ z
        raw = centre + (box.asked - given) / near
        a = box.inside(raw)
        off = given - gram @ a
        size = float(off.abs().amax())
        stalled = 0 if size < 0.5 * least else stalled + 1
        least = min(least, size)
        if size <= wanted or stalled > STALLED:
            return a, step
        towards = a - z
        free = ((raw > 0) & (raw < box.limit)).nonzero().flatten()
        if len(free):
            inner = gram[free][:, free]
            right = off[free] + (inner @ towards[free]) + near * towards[free]
            inner.diagonal().add_(near)
            towards[free] = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(inner))[:, 0]
        z = z + _length(box, centre, near, z, given, towards) * towards
    return box.inside(centre + (box.asked - gram @ z) / near), most


def _length(box: _Box, centre: Tensor, near: float, z: Tensor, given: Tensor, towards: Tensor) -> float:
    """How far to go, at most once the step: where the slope along it, which only rises, is 0."""
    along = box.gram @ towards

    def slope(t: float) -> float:
        a = box.inside(centre + (box.asked - given - t * along) / near)
        return float(along @ (z + t * towards - a))

    low, high = 0.0, 1.0
    if slope(high) <= 0:
        return high
    while high - low > 1e-3 * high and high > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return (low + high) / 2


def _contradictory(box: _Box, change: Tensor) -> bool:
    """Whether multipliers that grow without end prove hard rows contradictory (Farkas).

    With d >= 0 on hard rows, any x that fulfils them has |A' d| |x| >= d' A x >= d' asked.
    """
    d = torch.where(box.limit.isinf(), change.clamp_min(0), 0)
    needed = float(box.asked @ d)
    given = max(float(d @ box.gram @ d), 0.0) ** 0.5
    return needed > FAR * given * max(float(box.asked.abs().amax()), 1e-30)
