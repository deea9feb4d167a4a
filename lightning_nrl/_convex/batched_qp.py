"""Many small quadratic programmes at once: min 1/2 |v|^2 with A v >= b, each solved in its dual.

The dual is max b'u - 1/2 u'Gu over u >= 0 with the Gram matrix G = A A'. Its value at any u is a lower bound of
1/2 |v|^2 over all v that satisfy the rows; it grows without limit exactly where no v does. An active set method (Lawson
and Hanson 1974) solves for the rows that bind, and lets one in or out at a time.

With a limit on the value, the method works on G + bb' / (2 limit): the optimum is the same up to a factor, it is
bounded whatever the rows are, and to prove that a value exceeds the limit takes no more steps than to find an optimum.

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

STEPS = 400
"""Rows let in or out at most; a programme takes about twice as many as rows bind."""

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
        limit: programmes whose value exceeds it are left as they are then. Without one every programme must have a
            solution.
        steps: most rows let in or out.

    Returns:
        The duals; they are the optimum but where the limit or the steps ended the ascent.
    """
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(gram.dtype).tiny)
    gram = gram + torch.diag_embed(ridge[:, None].expand_as(bound))
    bounded = gram + (0.5 / limit) * bound[:, :, None] * bound[:, None, :]
    small = TOLERANCE * bound.abs().amax(1, keepdim=True)
    duals = _longest(duals, bounded, bound)
    inside = duals > 0
    settled, going = ~inside.any(1), torch.arange(len(gram), device=gram.device)
    for _ in range(steps if bound.shape[1] else 0):
        g, h, b, u, some = gram[going], bounded[going], bound[going], duals[going], inside[going]
        lacking = torch.where(some, -torch.inf, b - _times(h, u))
        most, new = lacking.max(1)
        enters = settled[going] & (most > small[going, 0])
        over = settled[going] & ~enters
        some[enters, new[enters]] = True
        goal = _solved(h, b, some)
        bad = some & (goal <= 0)
        ratio = torch.where(bad, u / (u - goal).clamp_min(torch.finfo(u.dtype).tiny), torch.inf)
        length = ratio.amin(1, keepdim=True).clamp_max(1.0)
        leaves = bad & (ratio <= length)
        next_u = torch.where(leaves, 0.0, (u + length * (goal - u)).clamp_min(0))
        # Rounding alone can let a row in that leaves at once.
        over |= ~next_u.isfinite().all(1) | (enters & (length[:, 0] <= 0))
        duals[going] = torch.where(over[:, None], u, next_u)
        inside[going] = some & ~leaves
        settled[going] = ~bad.any(1)
        over |= _value(g, b, _longest(duals[going], g, b)) > limit
        going = going[~over]
        if not len(going):
            break
    duals = _longest(duals, gram, bound)
    return Dual(duals, _value(gram, bound, duals))


def _solved(gram: Tensor, bound: Tensor, inside: Tensor) -> Tensor:
    """Duals for which the rows inside hold with equality, 0 outside; not finite where there are none."""
    width = max(1, int(inside.sum(1).amax()))
    at = inside.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    some = inside.gather(1, at)
    block = gram.gather(1, at[:, :, None].expand(-1, -1, gram.shape[2])).gather(2, at[:, None].expand(-1, width, -1))
    block = torch.where(some[:, :, None] & some[:, None, :], block, torch.diag_embed((~some).to(gram.dtype)))
    factor, failed = torch.linalg.cholesky_ex(block)
    found = torch.cholesky_solve(torch.where(some, bound.gather(1, at), 0.0)[:, :, None], factor)[:, :, 0]
    found = torch.where((failed > 0)[:, None], torch.nan, found)
    return torch.zeros_like(bound).scatter(1, at, torch.where(some, found, 0.0))


def _longest(duals: Tensor, gram: Tensor, bound: Tensor) -> Tensor:
    """The multiple of each programme's duals that has the largest value."""
    rise, curve = (bound * duals).sum(1), (duals * _times(gram, duals)).sum(1)
    return duals * (rise.clamp_min(0) / curve.clamp_min(torch.finfo(gram.dtype).tiny))[:, None]


def _times(gram: Tensor, duals: Tensor) -> Tensor:
    return torch.bmm(gram, duals[:, :, None])[:, :, 0]


def _value(gram: Tensor, bound: Tensor, duals: Tensor) -> Tensor:
    return (bound * duals).sum(1) - 0.5 * (duals * _times(gram, duals)).sum(1)
