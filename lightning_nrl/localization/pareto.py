"""Weights that no other weight beats in two respects at once."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrl.localization.neurecover_lite import places

__all__ = ["first_fronts", "pareto_front"]


def pareto_front(one: Tensor, other: Tensor) -> Tensor:
    """`W` bool, the weights that no other one dominates; larger is better in both of `one` and `other`, `W` each.

    A weight dominates another if it is at least as good in both and better in one, so equal ones are in it together.

    Example:
        >>> pareto_front(torch.tensor([3.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 2.0]))
        tensor([ True,  True,  True, False])
    """
    by_other = other.argsort(descending=True, stable=True)
    order = by_other[one[by_other].argsort(descending=True, stable=True)]
    a, b = one[order], other[order]
    before = torch.cat([b.new_full((1,), -torch.inf), b.cummax(0).values[:-1]])
    leads = b > before
    # Of equal weights the first one leads; the others are where its place is the last that led.
    rows = torch.arange(len(order), device=order.device)
    leader = torch.where(leads, rows, 0).cummax(0).values
    front = leads | ((a == a[leader]) & (b == b[leader]))
    return torch.zeros_like(front).scatter_(0, order, front)


def first_fronts(one: Tensor, other: Tensor, n_weights: int | None) -> Tensor:
    """Positions of weights, ascending: those of the Pareto front, or as many as asked for, front after front.

    The first front, then that of the rest, and so on. Of the last one as many as are lacking are taken, first those
    whose worse rank of the two is best, and of equal ones the first. Weights that are 0 in both are never taken.
    """
    left = ((one > 0) | (other > 0)).nonzero().squeeze(1)
    if n_weights is None:
        return left[pareto_front(one[left], other[left])]
    worse_rank = torch.maximum(places(one), places(other))
    taken = left[:0]
    while len(taken) < n_weights and len(left):
        front = pareto_front(one[left], other[left])
        new = left[front]
        new = new[worse_rank[new].argsort(stable=True)][: n_weights - len(taken)]
        taken, left = torch.cat([taken, new]), left[~front]
    return taken.sort().values
