"""Many small quadratic programmes at once: min 1/2 |v|^2 with A v >= b, each solved in its dual.

The dual is max b'u - 1/2 u'Gu over u >= 0 with the Gram matrix G = A A'. Its value at any u is a lower bound of
1/2 |v|^2 over all v that satisfy the rows; it grows without limit exactly where no v does. A sweep of coordinate ascent
finds the rows that bind; a Newton step on these solves them exactly.

`search.quadratic.solve_dual` solves one large programme with limits on its multipliers. It would take many times as
long for hundreds of small ones, one after the other; and here a value above a limit is an answer, since it proves that
there is no solution that small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Dual", "ascend"]

RIDGE = 1e-9
"""Added to the diagonal, relative to its mean: rows that are the same up to rounding have no unique duals."""

STEPS = 24
"""Newton steps at most; most programmes need fewer than ten."""

SWEEPS = 3
"""Sweeps before each Newton step, which costs as much as several."""

TOLERANCE = 1e-6
"""Residuals are small below this share of the largest bound."""


class Dual(NamedTuple):
    """Duals and what they prove."""

    duals: Tensor  # T x K, at least 0
    value: Tensor  # T, lower bounds of 1/2 |v|^2


def ascend(gram: Tensor, bound: Tensor, duals: Tensor, limit: float = torch.inf, steps: int = STEPS) -> Dual:
    """Solves T programmes of K rows each from given duals.

    Args:
        gram: `T x K x K`, symmetric and positive semidefinite. A row of zeros with a bound of 0 is none.
        bound: `T x K`, the right-hand sides.
        duals: `T x K`, at least 0, to start from.
        limit: programmes whose value exceeds it are left as they are then.
        steps: most Newton steps.

    Returns:
        The duals; they are the optimum but where the limit or the steps ended the ascent.
    """
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(gram.dtype).tiny)
    gram = gram + torch.diag_embed(ridge[:, None].expand_as(bound))
    scale = bound.abs().amax(1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    duals, going = duals.clone(), torch.arange(len(gram), device=gram.device)
    for _ in range(steps):
        g, b, u = gram[going], bound[going], duals[going]
        for _ in range(SWEEPS):
            u = _sweep(g, b, u)
        u = _newton(g, b, u)
        duals[going] = u
        residual = b - _times(g, u)
        optimal = ((residual < TOLERANCE * scale[going]) | (u == 0) & (residual <= 0)).all(1)
        optimal &= ((residual.abs() < TOLERANCE * scale[going]) | (u == 0)).all(1)
        going = going[~(optimal | (_value(g, b, u) > limit))]
        if not len(going):
            break
    return Dual(duals, _value(gram, bound, duals))


def _sweep(gram: Tensor, bound: Tensor, duals: Tensor) -> Tensor:
    """One pass of coordinate ascent over the rows of all programmes."""
    residual, duals = bound - _times(gram, duals), duals.clone()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    for k in range(bound.shape[1]):
        new = (duals[:, k] + residual[:, k] / diagonal[:, k]).clamp_min(0)
        residual -= (new - duals[:, k])[:, None] * gram[:, k]
        duals[:, k] = new
    return duals


def _newton(gram: Tensor, bound: Tensor, duals: Tensor) -> Tensor:
    """Towards the optimum over the rows with positive duals, as far as they stay at least 0."""
    free = duals > 0
    both = free[:, :, None] & free[:, None, :]
    system = torch.where(both, gram, 0.0) + torch.diag_embed((~free).to(gram.dtype))
    factor, _ = torch.linalg.cholesky_ex(system)
    goal = torch.cholesky_solve(torch.where(free, bound, 0.0)[:, :, None], factor)[:, :, 0]
    step = goal - duals
    ratio = torch.where(free & (step < 0), duals / -step.clamp_max(-torch.finfo(step.dtype).tiny), torch.inf)
    length = ratio.amin(1, keepdim=True).clamp_max(1.0)
    # The row that stops the step is left exactly.
    stopped = torch.where((ratio <= length) & (length < 1), 0.0, (duals + length * step).clamp_min(0))
    bent = goal.clamp_min(0)
    new = torch.where((_value(gram, bound, bent) > _value(gram, bound, stopped))[:, None], bent, stopped)
    return torch.where(new.isfinite().all(1, keepdim=True), new, duals)


def _times(gram: Tensor, duals: Tensor) -> Tensor:
    return torch.bmm(gram, duals[:, :, None])[:, :, 0]


def _value(gram: Tensor, bound: Tensor, duals: Tensor) -> Tensor:
    return (bound * duals).sum(1) - 0.5 * (duals * _times(gram, duals)).sum(1)
