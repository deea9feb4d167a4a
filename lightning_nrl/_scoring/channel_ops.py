"""Operations that treat channels one by one: on what candidates share once, and on the channels that differ for each.

An operation that is not listed here, in `channel_arithmetic` or in `channel_mixing`, or that is called in a way that is
not known there, gets whole tensors. Every handler takes the function and its arguments and gives a result or
`NotImplemented`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._scoring.candidate_tensor import CandidateTensor, handles

__all__: list[str] = []

RELU = (F.relu, torch.relu, Tensor.relu)
ACTIVATIONS = (
    *(*RELU, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus, F.logsigmoid),
    *(F.hardtanh, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, F.threshold),
)
POINTWISE = (
    *ACTIVATIONS,
    *(torch.relu_, torch.sigmoid, torch.tanh, torch.clamp, torch.exp, torch.sqrt, torch.square, torch.abs, torch.clone),
    *(Tensor.relu_, Tensor.sigmoid, Tensor.sigmoid_, Tensor.tanh, Tensor.tanh_, Tensor.clamp, Tensor.clamp_),
    *(Tensor.exp, Tensor.sqrt, Tensor.square, Tensor.abs, Tensor.pow, Tensor.__pow__, Tensor.__neg__),
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type),
    *(Tensor.detach, Tensor.clone, Tensor.contiguous),
)
POOLS = (
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate),
)
MEANS = (torch.mean, Tensor.mean)
ADAPTIVE_MEANS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
REDUCTIONS = (torch.mean, torch.sum, torch.amax, Tensor.mean, Tensor.sum, Tensor.amax)


def _inplace_position(function: Any) -> int | None:
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except (ValueError, TypeError):
        return None


INPLACE_POSITIONS = {function: _inplace_position(function) for function in ACTIVATIONS}
INPLACE_METHODS = (torch.relu_, Tensor.relu_, Tensor.sigmoid_, Tensor.tanh_, Tensor.clamp_)


@handles(*POINTWISE)
def _pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    x, *rest = args
    if not isinstance(x, CandidateTensor) or any(isinstance(a, Tensor) for a in (*rest, *kwargs.values())):
        return NotImplemented
    position = INPLACE_POSITIONS.get(func)
    flagged = position is not None and (kwargs.get("inplace") or (len(args) > position and args[position]))
    if flagged or func in INPLACE_METHODS:
        return x.assign(x.map_channels(lambda t, units: func(t.clone() if units is None else t, *rest, **kwargs)))
    if func in RELU and x.pending is not None and not x.identical:
        return CandidateTensor(torch.relu(x.base), x.copies, x.axis, x.units, x.evaluated().relu_())
    return x.map_channels(lambda t, _: func(t, *rest, **kwargs))


@handles(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout)
def _dropout(func: Any, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return NotImplemented if training and p else x


@handles(F.batch_norm)
def _batch_norm(
    func: Any,
    x: Any,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or not isinstance(x, CandidateTensor) or x.axis != 1:
        return NotImplemented

    def normalised(t: Tensor, units: Tensor | None) -> Tensor:
        vectors = [v if v is None or units is None else v.index_select(0, units) for v in (mean, var, weight, bias)]
        return F.batch_norm(t, vectors[0], vectors[1], vectors[2], vectors[3], False, momentum, eps)

    if x.pending is not None and not x.identical and var is not None:
        factor = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
        pending = x.pending.times(factor.to(x.dtype).index_select(0, x.units))
        return CandidateTensor(normalised(x.base, None), x.copies, x.axis, x.units, pending)
    return x.map_channels(normalised)


@handles(*POOLS)
def _pool(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, CandidateTensor) or x.axis != 1:
        return NotImplemented
    if any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
        return NotImplemented
    if kwargs.get("return_indices") or any(a is True for a in args[5:]):
        return NotImplemented
    if func in ADAPTIVE_MEANS and not kwargs and args in ((1,), ((1,) * (x.ndim - 2),)):
        return _mean_of_places(x, keepdim=True)
    return x.map_channels(lambda t, _: func(t, *args, **kwargs))


@handles(*REDUCTIONS)
def _reduce(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    dims = args[0] if args else kwargs.get("dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(x, CandidateTensor) or not isinstance(dims, (tuple, list)) or not dims:
        return NotImplemented
    places = {d % x.ndim for d in dims}
    if any(d <= x.axis for d in places):
        return NotImplemented
    if func in MEANS and len(args) < 3 and kwargs.keys() <= {"dim", "keepdim"} and len(places) == x.ndim - 1 - x.axis:
        return _mean_of_places(x, keepdim=bool(args[1] if len(args) > 1 else kwargs.get("keepdim")))
    return x.map_channels(lambda t, _: func(t, *args, **kwargs))


def _mean_of_places(x: CandidateTensor, keepdim: bool) -> CandidateTensor:
    """The mean over all that comes behind the channels.

    On a CPU as a product with a vector: a sum of few numbers that lie side by side takes several times as long.
    """
    dims = tuple(range(x.axis + 1, x.ndim))

    def mean(t: Tensor, units: Tensor | None) -> Tensor:
        flat = t.movedim(x.axis, 0).flatten(2) if units is not None and x.axis == 1 else None
        fits = flat is not None and flat.is_contiguous() and t.numel() and t.dtype in (torch.float32, torch.float64)
        if flat is None or not fits or t.device.type != "cpu":
            return t.mean(dims, keepdim)
        n = flat.shape[-1]
        found = torch.mv(flat.view(-1, n), flat.new_full((n,), 1 / n)).view(flat.shape[:2]).t()
        return found.view(*found.shape, *[1] * len(dims)) if keepdim else found

    return x.map_channels(mean)


@handles(torch.flatten, Tensor.flatten)
def _flatten(func: Any, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not isinstance(x, CandidateTensor) or end_dim % x.ndim != x.ndim - 1:
        return NotImplemented
    start = start_dim % x.ndim
    if start == 1 and x.axis == 1:
        return _flatten_channels(x)
    return x.map_channels(lambda t, _: t.flatten(start)) if start > x.axis else NotImplemented


@handles(Tensor.view, Tensor.reshape, torch.reshape)
def _view(func: Any, x: Any, *shape: Any) -> Any:
    if not isinstance(x, CandidateTensor) or x.axis != 1 or not shape or isinstance(shape[0], torch.dtype):
        return NotImplemented
    sizes = tuple(shape[0]) if isinstance(shape[0], (tuple, list, torch.Size)) else shape
    features = x.base[0].numel()
    if sizes in ((x.shape[0], -1), (-1, features), (x.shape[0], features)):
        return _flatten_channels(x)
    if len(sizes) > 2 and sizes[:2] == tuple(x.shape[:2]):
        return x.map_channels(lambda t, _: t.reshape(*t.shape[:2], *sizes[2:]))
    return NotImplemented


def _flatten_channels(x: CandidateTensor) -> CandidateTensor:
    base = x.base.flatten(1)
    if x.identical:
        return CandidateTensor.repeated(base, x.copies)
    places = x.base[0, 0].numel()
    units = (x.units.unsqueeze(1) * places + torch.arange(places, device=base.device)).flatten()
    return CandidateTensor(base, x.copies, 1, units if places > 1 else x.units, x.changed.flatten(2))
