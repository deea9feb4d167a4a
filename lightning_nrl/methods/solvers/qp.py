"""Quadratic programmes for the smallest change that meets linear constraints, solved in their dual.

A programme is

    min over x, s >= 0   1/2 |x|^2 + sum_i limit_i * s_i     so that   A x + s >= required,

where a row with an infinite limit is hard: its s is 0. The dual has one multiplier per row,
constrained only by bounds,

    max over a   required' a - 1/2 a' K a     so that   0 <= a <= limit,     K = A A',

and x = A' a. The dual's value at any a within the bounds is a lower bound of the minimum. The dual
is unbounded exactly if the hard rows contradict each other.

There are two solvers, each too slow for the other's task. Both run in float64 on the CPU: a GPU
would wait for the host some 30,000 times per repair. If a row of A is zero, its `required` must be
0.

- `solve_dual` solves one large dual, singular if there are more rows than unknowns. It makes
  proximal steps (Rockafellar 1976), each by a semismooth Newton method with an exact line search
  (Li, Sun and Toh 2018).
- `solve_duals` solves many small duals with hard rows, each as non-negative least squares (Lawson
  and Hanson 1974). To limit the dual's value, K + bb' / (2 max_value) with b = required replaces K.
  Then the optimum is bounded, and the optimal a is only scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from lightning_nrl._utils.interrupts import poll

# Violation of the optimality conditions, relative to the largest of `required`.
CONDITIONS_TOLERANCE = 1e-7
# Weight of the proximal term for rows of norm 1, its decay per step, and its minimum. Large at
# first, so that only few multipliers reach or leave a bound at once; a Cholesky factor in float64
# needs the minimum.
PROXIMAL_WEIGHT = 0.1
PROXIMAL_DECAY = 0.3
MIN_PROXIMAL_WEIGHT = 1e-6
# Limits of proximal steps, Newton steps, and Newton steps in a row without progress. Programmes of
# 200 to 1,500 rows take 5 to 10 proximal and 20 to 60 Newton steps; only multipliers a million
# times as large as others need more.
MAX_PROXIMAL_STEPS = 60
MAX_NEWTON_STEPS = 400
MAX_STALLED_STEPS = 10


@torch.no_grad()
def solve_dual(
    gram: Tensor,
    required: Tensor,
    limit: Tensor,
    start: Tensor,
    is_over: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Returns the optimal multipliers of one programme, `m`, on the device of `gram`.

    Args:
        gram: K = A A', `m x m`.
        required: lower bound of each row, `m`.
        limit: upper bounds of the multipliers, `m`, infinite for hard rows, which must not
            contradict each other.
        start: initial multipliers, `m`, such as those of a similar programme.
        is_over: is called at each step; if it returns True, the best multipliers so far are
            returned.
    """
    if not len(required):
        return start
    exact = gram.to("cpu", torch.float64)
    # Rows are scaled to norm 1, so that one tolerance and one proximal weight suit all. Zero rows
    # stay.
    norm = exact.diagonal().clamp_min(0).sqrt()
    norm = torch.where(norm > 1e-12 * norm.amax(), norm, 1)
    box = _Box(exact / norm / norm[:, None], required.to(norm) / norm, limit.to(norm) * norm)
    values = _proximal(box, box.project(start.to(norm) * norm), is_over)
    return (values / norm).to(gram)


@dataclass(frozen=True)
class _Box:
    """The programme min 1/2 a' K a - b' a so that 0 <= a <= limit, with `gram` K, `required` b."""

    gram: Tensor
    required: Tensor
    limit: Tensor

    def project(self, values: Tensor) -> Tensor:
        return values.clamp_min(0).minimum(self.limit)

    def residual(self, values: Tensor) -> float:
        """Returns the largest violation of the optimality conditions, in units of `required`."""
        gradient = self.gram @ values - self.required
        at_bound = ((values <= 0) & (gradient > 0)) | ((values >= self.limit) & (gradient < 0))
        return float(gradient.masked_fill(at_bound, 0).abs().amax())


def _proximal(box: _Box, values: Tensor, is_over: Callable[[], bool]) -> Tensor:
    """Solves the programme in steps, with a shrinking penalty on the distance that a step moves."""
    scale = max(float(box.required.abs().amax()), 1e-30)
    best = values
    least = box.residual(values)
    weight = PROXIMAL_WEIGHT
    steps_left = MAX_NEWTON_STEPS
    tolerance = 0.1 * scale
    for _ in range(MAX_PROXIMAL_STEPS):
        if least <= CONDITIONS_TOLERANCE * scale or steps_left <= 0 or is_over():
            break
        tolerance = max(tolerance * 0.1, 0.5 * CONDITIONS_TOLERANCE * scale)
        values, n_steps = _newton(box, values, weight, tolerance, steps_left, is_over)
        steps_left -= n_steps
        residual = box.residual(values)
        if residual < least:
            best = values
            least = residual
        weight = max(weight * PROXIMAL_DECAY, MIN_PROXIMAL_WEIGHT)
    return best


def _newton(
    box: _Box,
    centre: Tensor,
    weight: float,
    tolerance: float,
    max_steps: int,
    is_over: Callable[[], bool],
) -> tuple[Tensor, int]:
    """Makes one proximal step; returns the multipliers a and the number of Newton steps.

    Over x = A' z it minimises 1/2 |x|^2 plus a smooth, piecewise quadratic penalty. The gradient is
    A' (z - a), where a follows from the penalty at x.
    """
    gram = box.gram
    z = centre
    least = torch.inf
    stalled = 0
    for step in range(max_steps):
        poll()
        product = gram @ z
        raw = centre + (box.required - product) / weight
        a = box.project(raw)
        gradient = product - gram @ a
        size = float(gradient.abs().amax())
        stalled = 0 if size < 0.5 * least else stalled + 1
        least = min(least, size)
        if size <= tolerance or stalled > MAX_STALLED_STEPS or is_over():
            return a, step
        direction = a - z
        free = ((raw > 0) & (raw < box.limit)).nonzero().flatten()
        if len(free):
            inner = gram[free][:, free]
            right = gradient[free] + (inner @ direction[free]) + weight * direction[free]
            inner.diagonal().add_(weight)
            factor = torch.linalg.cholesky(inner)
            direction[free] = torch.cholesky_solve(right[:, None], factor)[:, 0]
        z = z + _line_search(box, centre, weight, z, product, direction) * direction
    return box.project(centre + (box.required - gram @ z) / weight), max_steps


def _line_search(
    box: _Box, centre: Tensor, weight: float, z: Tensor, product: Tensor, direction: Tensor
) -> float:
    """Finds the step length in [0, 1] at which the slope along `direction` is 0.

    The slope never falls on the way. `product` is K z.
    """
    along = box.gram @ direction

    def slope(t: float) -> float:
        a = box.project(centre + (box.required - product - t * along) / weight)
        return float(along @ (z + t * direction - a))

    low = 0.0
    high = 1.0
    if slope(high) <= 0:
        return high
    while high - low > 1e-3 * high and high > 1e-9:
        middle = (low + high) / 2
        if slope(middle) > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2


LEAST_EIGENVALUE = 1e-9  # relative to the largest; equal rows then have unique multipliers
EXCHANGES_PER_ROW = 30  # rows added or dropped, at most; usually about two per binding row


@torch.no_grad()
def solve_duals(gram: Tensor, required: Tensor, max_value: float) -> tuple[Tensor, Tensor]:
    """Solves the duals of `T` small programmes whose rows are all hard.

    Args:
        gram: K = A A' of each programme, `T x m x m`.
        required: lower bound of each row, `T x m`.
        max_value: programmes with a larger optimum count as infeasible.

    Returns:
        the multipliers, `T x m`, on the device of `gram`, and each dual's value, `T`, on the CPU. A
        value above `max_value` shows that the rows contradict each other or need a larger change.
    """
    exact = gram.to("cpu", torch.float64)
    required = required.to(exact)
    if not required.numel():
        return required.to(gram), required.sum(1)
    bounded = exact + (0.5 / max_value) * required[:, :, None] * required[:, None, :]
    eigenvalues, vectors = torch.linalg.eigh(bounded)
    least = 1e-300 + LEAST_EIGENVALUE * eigenvalues[:, -1:]
    root = eigenvalues.maximum(least).sqrt()[:, :, None]
    factors = root * vectors.mT
    right = (vectors.mT @ required[:, :, None] / root)[:, :, 0]
    most = EXCHANGES_PER_ROW * required.shape[1]
    solved = [nnls(factor, b, maxiter=most)[0] for factor, b in zip(factors, right, strict=True)]
    values = torch.tensor(np.stack(solved))  # a copy: MKL rounds by alignment, and numpy's varies
    # The best multiple.
    rise = (required * values).sum(1)
    curve = (values * _times(exact, values)).sum(1)
    values *= (rise / curve.clamp_min(1e-300))[:, None]
    value = (required * values).sum(1) - 0.5 * (values * _times(exact, values)).sum(1)
    return values.to(gram), value


def _times(gram: Tensor, values: Tensor) -> Tensor:
    return torch.bmm(gram, values[:, :, None])[:, :, 0]
