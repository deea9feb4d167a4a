"""Operations that mix channels: a Linear or a convolution adds what the channels that differ change in its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._scoring.candidate_tensor import CandidateTensor, handles

__all__: list[str] = []


@handles(F.linear)
def _linear(func: Any, x: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(x, CandidateTensor) or isinstance(weight, CandidateTensor):
        return NotImplemented
    if x.identical:
        return CandidateTensor.repeated(func(x.base, weight, bias), x.copies)
    if x.axis != x.ndim - 1:
        return NotImplemented
    if x.all_differ:
        return func(x.changed, weight.index_select(1, x.units), bias).flatten(0, 1)
    if not _is_exact_in_parts(x):
        return NotImplemented
    delta = (x.changed - x.base.index_select(x.axis, x.units)) @ weight.index_select(1, x.units).t()
    return delta.add_(func(x.base, weight, bias)).flatten(0, 1)


@handles(torch.conv1d, torch.conv2d, torch.conv3d)
def _conv(
    func: Any,
    x: Any,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not isinstance(x, CandidateTensor) or isinstance(weight, CandidateTensor):
        return NotImplemented
    if x.identical:
        return CandidateTensor.repeated(func(x.base, weight, bias, stride, padding, dilation, groups), x.copies)
    if groups == x.shape[1] == len(weight) and x.axis == 1:

        def depthwise(t: Tensor, units: Tensor | None) -> Tensor:
            own = [w if w is None or units is None else w.index_select(0, units) for w in (weight, bias)]
            out: Tensor = func(t, *own, stride, padding, dilation, t.shape[1])
            return out

        return x.map_channels(depthwise)
    if groups != 1 or x.axis != 1:
        return NotImplemented
    if x.all_differ:
        return func(x.changed.flatten(0, 1), weight.index_select(1, x.units), bias, stride, padding, dilation)
    if not _is_exact_in_parts(x):
        return NotImplemented
    base = func(x.base, weight, bias, stride, padding, dilation)
    change = (x.changed - x.base.index_select(1, x.units)).flatten(0, 1)
    delta = func(change, weight.index_select(1, x.units), None, stride, padding, dilation)
    return delta.unflatten(0, (x.copies, -1)).add_(base).flatten(0, 1)


@handles(F.layer_norm, F.group_norm, F.embedding, F.prelu)
def _samplewise(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, CandidateTensor) or not x.identical:
        return NotImplemented
    if any(isinstance(a, CandidateTensor) for a in (*args, *kwargs.values())):
        return NotImplemented
    return CandidateTensor.repeated(func(x.base, *args, **kwargs), x.copies)


@handles(torch.cat, torch.concat, torch.concatenate)
def _cat(func: Any, tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    if not all(isinstance(t, CandidateTensor) and t.materialized is None and t.copies == first.copies for t in tensors):
        return NotImplemented
    dim %= first.ndim
    if dim == 0 or any(not t.identical and t.axis != dim for t in tensors):
        return NotImplemented
    base = torch.cat([t.base for t in tensors], dim)
    if all(t.identical for t in tensors):
        return CandidateTensor.repeated(base, first.copies)
    offset, units, changed = 0, [], []
    for t in tensors:
        if not t.identical:
            units.append(t.units + offset)
            changed.append(t.changed)
        offset += t.shape[dim]
    return CandidateTensor(base, first.copies, dim, torch.cat(units), torch.cat(changed, dim + 1))


def _is_exact_in_parts(x: CandidateTensor) -> bool:
    """Whether a product may be summed from two parts: not in half precision, where two roundings are not one."""
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
