"""Many small duals at once, all rows hard: an active-set method (Lawson and Hanson 1974).

It solves for the rows that bind, and lets one in or out at a time. With a limit on the value, the method works on
K + bb' / (2 limit): the optimum is the same up to a factor, it is bounded whatever the rows are, and to prove that a
value exceeds the limit takes no more steps than to find an optimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["solve_batch"]

RELATIVE_JITTER = 1e-9
"""Added to the diagonal, relative to its mean: rows that are the same up to rounding have no unique multipliers."""

MAX_EXCHANGES = 400
"""Rows let in or out at most; a programme takes about twice as many as rows bind."""

RESIDUAL_TOLERANCE = 1e-6
"""Residuals are small below this part of the most that a row requires."""


def solve_batch(gram: Tensor, required: Tensor, values: Tensor, max_value: float) -> tuple[Tensor, Tensor, Tensor]:
    """Multipliers `T x m`, the dual's value `T`, and whether the method ended by itself, `T` bool.

    Args:
        gram: `T x m x m`, symmetric and positive semidefinite.
        required: `T x m`.
        values: `T x m`, at least 0, to start from.
        max_value: programmes whose value exceeds it are left as they are then.
    """
    if not required.numel():
        return values, required.sum(1), torch.ones(len(gram), dtype=torch.bool)
    jitter = RELATIVE_JITTER * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(gram.dtype).tiny)
    gram = gram + torch.diag_embed(jitter[:, None].expand_as(required))
    bounded = gram + (0.5 / max_value) * required[:, :, None] * required[:, None, :]
    small = RESIDUAL_TOLERANCE * required.abs().amax(1, keepdim=True)
    values = _best_multiple(values, bounded, required)
    binding = values > 0
    settled, going = ~binding.any(1), torch.arange(len(gram))
    for _ in range(MAX_EXCHANGES):
        g, h, b, u, some = gram[going], bounded[going], required[going], values[going], binding[going]
        lacking = torch.where(some, -torch.inf, b - _times(h, u))
        most, new = lacking.max(1)
        enters = settled[going] & (most > small[going, 0])
        over = settled[going] & ~enters
        some[enters, new[enters]] = True
        goal = _solve_equalities(h, b, some)
        bad = some & (goal <= 0)
        ratio = torch.where(bad, u / (u - goal).clamp_min(torch.finfo(u.dtype).tiny), torch.inf)
        length = ratio.amin(1, keepdim=True).clamp_max(1.0)
        leaves = bad & (ratio <= length)
        next_u = torch.where(leaves, 0.0, (u + length * (goal - u)).clamp_min(0))
        # Rounding alone can let a row in that leaves at once.
        over |= ~next_u.isfinite().all(1) | (enters & (length[:, 0] <= 0))
        values[going] = torch.where(over[:, None], u, next_u)
        binding[going] = some & ~leaves
        settled[going] = ~bad.any(1)
        over |= _value(g, b, _best_multiple(values[going], g, b)) > max_value
        going = going[~over]
        if not len(going):
            break
    values = _best_multiple(values, gram, required)
    is_solved = torch.ones(len(gram), dtype=torch.bool)
    is_solved[going] = False
    return values, _value(gram, required, values), is_solved


def _solve_equalities(gram: Tensor, required: Tensor, binding: Tensor) -> Tensor:
    """Multipliers for which the binding rows hold with equality, 0 elsewhere; not finite where there are none."""
    width = max(1, int(binding.sum(1).amax()))
    at = binding.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    some = binding.gather(1, at)
    block = gram.gather(1, at[:, :, None].expand(-1, -1, gram.shape[2])).gather(2, at[:, None].expand(-1, width, -1))
    block = torch.where(some[:, :, None] & some[:, None, :], block, torch.diag_embed((~some).to(gram.dtype)))
    factor, failed = torch.linalg.cholesky_ex(block)
    found = torch.cholesky_solve(torch.where(some, required.gather(1, at), 0.0)[:, :, None], factor)[:, :, 0]
    found = torch.where((failed > 0)[:, None], torch.nan, found)
    return torch.zeros_like(required).scatter(1, at, torch.where(some, found, 0.0))


def _best_multiple(values: Tensor, gram: Tensor, required: Tensor) -> Tensor:
    """The multiple of each programme's multipliers that has the largest value."""
    rise, curve = (required * values).sum(1), (values * _times(gram, values)).sum(1)
    return values * (rise.clamp_min(0) / curve.clamp_min(torch.finfo(gram.dtype).tiny))[:, None]


def _times(gram: Tensor, values: Tensor) -> Tensor:
    return torch.bmm(gram, values[:, :, None])[:, :, 0]


def _value(gram: Tensor, required: Tensor, values: Tensor) -> Tensor:
    return (required * values).sum(1) - 0.5 * (values * _times(gram, values)).sum(1)
