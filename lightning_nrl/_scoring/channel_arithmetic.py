"""Sums and products of tensors of many candidates, with each other, with plain tensors and with numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._scoring.candidate_tensor import CandidateTensor, handles

__all__: list[str] = []

ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
OPERATIONS = (
    *(*ADDITIONS, torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__),
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
    *(torch.div, torch.true_divide, Tensor.div, Tensor.true_divide, Tensor.__truediv__, Tensor.__rtruediv__),
)
IN_PLACE: dict[Any, Callable[..., Any]] = {
    Tensor.__iadd__: operator.add,
    Tensor.__isub__: operator.sub,
    Tensor.__imul__: operator.mul,
    Tensor.__itruediv__: operator.truediv,
    Tensor.add_: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.mul_: torch.mul,
}
"""Each operation that changes its first argument, and the one that gives a new tensor."""


@handles(*OPERATIONS, *IN_PLACE)
def _binary(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if "out" in kwargs:
        return NotImplemented
    in_place, apply = func in IN_PLACE, IN_PLACE.get(func, func)
    if not isinstance(a, CandidateTensor):
        return _onto_plain(apply, a, b, in_place, kwargs) if isinstance(a, Tensor) else NotImplemented
    if isinstance(b, CandidateTensor):
        out = _shifted(apply, a, b, kwargs)
        if out is NotImplemented:
            out = _both(lambda s, t: apply(s, t, **kwargs), a, b)
    elif isinstance(b, Tensor) and b.ndim:
        out = _with_plain(lambda s, t: apply(s, t, **kwargs), a, b)
    else:
        out = a.map_channels(lambda t, _: apply(t, b, **kwargs))
    if out is NotImplemented or not in_place:
        return out
    return a.assign(out) if out.shape == a.shape and out.dtype == a.dtype else NotImplemented


def _shifted(apply: Callable[..., Any], a: CandidateTensor, b: CandidateTensor, kwargs: dict[str, Any]) -> Any:
    """A sum of what differs and what does not: only the base moves."""
    if kwargs or apply not in (*ADDITIONS, operator.add) or a.shape != b.shape or a.copies != b.copies:
        return NotImplemented
    for x, other in ((a, b), (b, a)):
        if x.pending is not None and not x.identical and other.identical and x.dtype == other.dtype:
            return CandidateTensor(a.base + b.base, a.copies, x.axis, x.units, x.pending)
    return NotImplemented


def _both(apply: Callable[[Tensor, Tensor], Tensor], a: CandidateTensor, b: CandidateTensor) -> Any:
    if a.copies != b.copies or a.ndim != b.ndim or len(a.base) != len(b.base):
        return NotImplemented
    if a.identical and b.identical:
        return CandidateTensor.repeated(apply(a.base, b.base), a.copies)
    dim = b.axis if a.identical else a.axis
    if (not a.identical and not b.identical and a.axis != b.axis) or a.base.shape[dim] != b.base.shape[dim]:
        return NotImplemented
    units = b.units if a.identical else a.units
    if not a.identical and not b.identical and a.units is not b.units:
        units = torch.cat([a.units, b.units]).unique()
    changed = apply(_channels(a, dim, units), _channels(b, dim, units))
    return CandidateTensor(apply(a.base, b.base), a.copies, dim, units, changed)


def _channels(x: CandidateTensor, dim: int, units: Tensor) -> Tensor:
    """The values in some channels, `P or 1 x n x ...`."""
    if x.units is units:
        return x.changed
    base = x.base.index_select(dim, units).unsqueeze(0)
    if x.identical:
        return base
    whole = base.expand(x.copies, *base.shape[1:]).clone()
    return whole.index_copy_(dim + 1, (units.unsqueeze(1) == x.units).int().argmax(0), x.changed)


def _with_plain(apply: Callable[[Tensor, Tensor], Tensor], a: CandidateTensor, b: Tensor) -> Any:
    if b.shape == a.shape and len(b) != 1:
        if not a.identical:
            return NotImplemented
        return apply(a.base.unsqueeze(0), b.unflatten(0, (a.copies, -1))).flatten(0, 1)
    if b.ndim > a.ndim or (b.ndim == a.ndim and len(b) != 1):
        return NotImplemented
    place = a.axis - (a.ndim - b.ndim)

    def one(t: Tensor, units: Tensor | None) -> Tensor:
        return apply(t, b if units is None or place < 0 or b.shape[place] == 1 else b.index_select(place, units))

    return a.map_channels(one) if torch.broadcast_shapes(a.shape, b.shape) == a.shape else NotImplemented


def _onto_plain(apply: Any, a: Tensor, b: CandidateTensor, in_place: bool, kwargs: dict[str, Any]) -> Any:
    if not b.identical or a.shape != b.shape:
        return NotImplemented
    out = apply(a.unflatten(0, (b.copies, -1)), b.base.unsqueeze(0), **kwargs).flatten(0, 1)
    return a.copy_(out) if in_place else out
