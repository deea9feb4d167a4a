"""Operations that know `Varied`: run on what the candidates share once, and on the channels that differ for each.

An operation that is not listed, or is called in a way that is not known here, gets whole tensors. Every handler takes
the function and its arguments and gives a result or `NotImplemented`. Import `Varied` from here to have them in force.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl._scoring.varied import Varied, handles

__all__ = ["Varied"]

ACTIVATIONS = [
    *(F.relu, F.relu6, F.gelu, F.silu, F.elu, F.selu, F.celu, F.leaky_relu, F.hardtanh, F.hardswish, F.hardsigmoid),
    *(F.mish, F.softplus, F.softsign, F.logsigmoid, F.sigmoid, F.tanh, F.threshold),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.abs, torch.neg, torch.exp, torch.log, torch.sqrt),
    *(torch.square, torch.rsqrt, torch.clamp, torch.erf, torch.sin, torch.cos, torch.nan_to_num, torch.clone),
]
METHODS = [
    "relu",
    "relu_",
    "sigmoid",
    "sigmoid_",
    "tanh",
    "tanh_",
    "abs",
    "neg",
    "exp",
    "log",
    "sqrt",
    "square",
    "rsqrt",
    "clamp",
    "clamp_",
    "erf",
    "sin",
    "cos",
    "nan_to_num",
    "float",
    "double",
    "half",
    "bfloat16",
    "to",
    "type",
    "detach",
    "clone",
    "contiguous",
    "__neg__",
    "__pow__",
    "pow",
]
POOLS = [
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.lp_pool2d, F.interpolate),
]
REDUCTIONS = ["mean", "sum", "amax", "amin", "var", "std"]
SAMPLEWISE = [F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.normalize, F.embedding, F.prelu]
SUMS = ["add", "sub", "mul", "div", "true_divide"]
OPERATORS = [
    "__add__",
    "__radd__",
    "__iadd__",
    "__sub__",
    "__rsub__",
    "__isub__",
    "__mul__",
    "__rmul__",
    "__imul__",
    "__truediv__",
    "__rtruediv__",
    "__itruediv__",
    "__div__",
]


def _place_of_inplace(function: Any) -> int | None:
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except (ValueError, TypeError):
        return None


INPLACE = {function: _place_of_inplace(function) for function in (*ACTIVATIONS, F.dropout)}
RELU = (F.relu, torch.relu, Tensor.relu)
ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, operator.add)
IN_PLACE_OPERATORS = {getattr(Tensor, name) for name in ("__iadd__", "__isub__", "__imul__", "__itruediv__")}


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    place = INPLACE.get(func)
    if place is not None and (kwargs.get("inplace") or (len(args) > place and args[place])):
        return True
    name = getattr(func, "__name__", "")
    return func in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


@handles(*ACTIVATIONS, *(getattr(Tensor, name) for name in METHODS))
def _pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    x, *rest = args
    if not isinstance(x, Varied) or any(isinstance(a, Tensor) for a in (*rest, *kwargs.values())):
        return NotImplemented
    if _in_place(func, args, kwargs):
        return x.become(x.each(lambda t, units: func(t.clone() if units is None else t, *rest, **kwargs)))
    if func in RELU and x.pending is not None and not x.same:
        return Varied(torch.relu(x.base), x.copies, x.axis, x.units, x.evaluated().relu_())
    return x.each(lambda t, _: func(t, *rest, **kwargs))


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
    if training or not isinstance(x, Varied) or x.axis != 1:
        return NotImplemented

    def normalised(t: Tensor, units: Tensor | None) -> Tensor:
        vectors = [v if v is None or units is None else v.index_select(0, units) for v in (mean, var, weight, bias)]
        return func(t, *vectors, False, momentum, eps)

    if x.pending is not None and not x.same and var is not None:
        factor = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
        pending = x.pending.times(factor.to(x.dtype).index_select(0, x.units))
        return Varied(normalised(x.base, None), x.copies, x.axis, x.units, pending)
    return x.each(normalised)


@handles(*POOLS)
def _pool(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Varied) or x.axis != 1 or any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
        return NotImplemented
    if kwargs.get("return_indices") or any(a is True for a in args[5:]):
        return NotImplemented
    return x.each(lambda t, _: func(t, *args, **kwargs))


@handles(*(getattr(owner, name) for owner in (torch, Tensor) for name in REDUCTIONS))
def _reduce(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    dims = args[0] if args else kwargs.get("dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(x, Varied) or not isinstance(dims, (tuple, list)) or not dims:
        return NotImplemented
    if isinstance(dims[0], bool) or any(d % x.ndim <= x.axis for d in dims):
        return NotImplemented
    return x.each(lambda t, _: func(t, *args, **kwargs))


@handles(torch.flatten, Tensor.flatten)
def _flatten(func: Any, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not isinstance(x, Varied) or end_dim % x.ndim != x.ndim - 1:
        return NotImplemented
    start = start_dim % x.ndim
    if start == 1 and x.axis == 1:
        return _channels_flattened(x)
    return x.each(lambda t, _: t.flatten(start)) if start > x.axis else NotImplemented


@handles(Tensor.view, Tensor.reshape, torch.reshape)
def _view(func: Any, x: Any, *shape: Any) -> Any:
    if not isinstance(x, Varied) or x.axis != 1 or not shape or isinstance(shape[0], torch.dtype):
        return NotImplemented
    sizes = tuple(shape[0]) if isinstance(shape[0], (tuple, list, torch.Size)) else shape
    features = x.base[0].numel()
    if sizes in ((x.shape[0], -1), (-1, features), (x.shape[0], features)):
        return _channels_flattened(x)
    if len(sizes) > 2 and sizes[:2] == tuple(x.shape[:2]):
        return x.each(lambda t, _: t.reshape(*t.shape[:2], *sizes[2:]))
    return NotImplemented


@handles(torch.squeeze, Tensor.squeeze)
def _squeeze(func: Any, x: Any, dim: Any = None) -> Any:
    if not isinstance(x, Varied) or not isinstance(dim, int) or dim % x.ndim <= x.axis:
        return NotImplemented
    return x.each(lambda t, _: t.squeeze(dim))


@handles(*(getattr(owner, name) for owner in (torch, Tensor) for name in SUMS), Tensor.add_, Tensor.sub_, Tensor.mul_)
@handles(*(getattr(Tensor, name) for name in OPERATORS if hasattr(Tensor, name)))
def _binary(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if "out" in kwargs:
        return NotImplemented
    in_place = _in_place(func, (), {})
    apply = {
        Tensor.__iadd__: operator.add,
        Tensor.__isub__: operator.sub,
        Tensor.__imul__: operator.mul,
        Tensor.__itruediv__: operator.truediv,
        Tensor.add_: torch.add,
        Tensor.sub_: torch.sub,
        Tensor.mul_: torch.mul,
    }.get(func, func)
    if not isinstance(a, Varied):
        return _onto_plain(apply, a, b, in_place, kwargs) if isinstance(a, Tensor) else NotImplemented
    if isinstance(b, Varied):
        out = _shifted(apply, a, b, kwargs)
        if out is NotImplemented:
            out = _both(lambda s, t: apply(s, t, **kwargs), a, b)
    elif isinstance(b, Tensor) and b.ndim:
        out = _with_plain(lambda s, t: apply(s, t, **kwargs), a, b)
    else:
        out = a.each(lambda t, _: apply(t, b, **kwargs))
    if out is NotImplemented or not in_place:
        return out
    return a.become(out) if out.shape == a.shape and out.dtype == a.dtype else NotImplemented


def _shifted(apply: Callable[..., Any], a: Varied, b: Varied, kwargs: dict[str, Any]) -> Any:
    """A sum of what differs and what does not: only the base moves."""
    if kwargs or apply not in ADDITIONS or a.shape != b.shape or a.copies != b.copies:
        return NotImplemented
    for x, other in ((a, b), (b, a)):
        if x.pending is not None and not x.same and other.same and x.dtype == other.dtype:
            return Varied(a.base + b.base, a.copies, x.axis, x.units, x.pending)
    return NotImplemented


def _both(apply: Callable[[Tensor, Tensor], Tensor], a: Varied, b: Varied) -> Any:
    if a.copies != b.copies or a.ndim != b.ndim or len(a.base) != len(b.base):
        return NotImplemented
    if a.same and b.same:
        return Varied.repeated(apply(a.base, b.base), a.copies)
    dim = b.axis if a.same else a.axis
    if (not a.same and not b.same and a.axis != b.axis) or a.base.shape[dim] != b.base.shape[dim]:
        return NotImplemented
    units = b.units if a.same else a.units
    if not a.same and not b.same and a.units is not b.units:
        units = torch.cat([a.units, b.units]).unique()
    changed = apply(_at(a, dim, units), _at(b, dim, units))
    return Varied(apply(a.base, b.base), a.copies, dim, units, changed)


def _at(x: Varied, dim: int, units: Tensor) -> Tensor:
    """The values at some channels, `P or 1 x n x ...`."""
    if x.units is units:
        return x.changed
    base = x.base.index_select(dim, units).unsqueeze(0)
    if x.same:
        return base
    whole = base.expand(x.copies, *base.shape[1:]).clone()
    return whole.index_copy_(dim + 1, (units.unsqueeze(1) == x.units).int().argmax(0), x.changed)


def _with_plain(apply: Callable[[Tensor, Tensor], Tensor], a: Varied, b: Tensor) -> Any:
    if b.shape == a.shape and len(b) != 1:
        if not a.same:
            return NotImplemented
        return apply(a.base.unsqueeze(0), b.unflatten(0, (a.copies, -1))).flatten(0, 1)
    if b.ndim > a.ndim or (b.ndim == a.ndim and len(b) != 1):
        return NotImplemented
    place = a.axis - (a.ndim - b.ndim)

    def one(t: Tensor, units: Tensor | None) -> Tensor:
        sliced = units is not None and place >= 0 and b.shape[place] != 1
        return apply(t, b.index_select(place, units) if sliced else b)  # type: ignore[arg-type]

    return a.each(one) if torch.broadcast_shapes(a.shape, b.shape) == a.shape else NotImplemented


def _onto_plain(apply: Any, a: Tensor, b: Varied, in_place: bool, kwargs: dict[str, Any]) -> Any:
    if not b.same or a.shape != b.shape:
        return NotImplemented
    out = apply(a.unflatten(0, (b.copies, -1)), b.base.unsqueeze(0), **kwargs).flatten(0, 1)
    return a.copy_(out) if in_place else out


@handles(F.linear)
def _linear(func: Any, x: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(x, Varied) or isinstance(weight, Varied):
        return NotImplemented
    if x.same:
        return Varied.repeated(func(x.base, weight, bias), x.copies)
    if x.axis != x.ndim - 1:
        return NotImplemented
    if x.all_differ:
        return func(x.changed, weight.index_select(1, x.units), bias).flatten(0, 1)
    if not _exact_in_parts(x):
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
    if not isinstance(x, Varied) or isinstance(weight, Varied):
        return NotImplemented
    if x.same:
        return Varied.repeated(func(x.base, weight, bias, stride, padding, dilation, groups), x.copies)
    if groups == x.shape[1] == len(weight) and x.axis == 1:

        def depthwise(t: Tensor, units: Tensor | None) -> Tensor:
            if units is None:
                return func(t, weight, bias, stride, padding, dilation, groups)
            own = None if bias is None else bias.index_select(0, units)
            return func(t, weight.index_select(0, units), own, stride, padding, dilation, len(units))

        return x.each(depthwise)
    if groups != 1 or x.axis != 1:
        return NotImplemented
    if x.all_differ:
        return func(x.changed.flatten(0, 1), weight.index_select(1, x.units), bias, stride, padding, dilation)
    if not _exact_in_parts(x):
        return NotImplemented
    base = func(x.base, weight, bias, stride, padding, dilation)
    change = (x.changed - x.base.index_select(1, x.units)).flatten(0, 1)
    delta = func(change, weight.index_select(1, x.units), None, stride, padding, dilation)
    return delta.unflatten(0, (x.copies, -1)).add_(base).flatten(0, 1)


@handles(*SAMPLEWISE)
def _samplewise(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Varied) or not x.same or any(isinstance(a, Varied) for a in (*args, *kwargs.values())):
        return NotImplemented
    if func in (F.softmax, F.log_softmax, F.normalize) and (args[0] if args else kwargs.get("dim", 1)) in (
        None,
        0,
        -x.ndim,
    ):
        return NotImplemented
    return Varied.repeated(func(x.base, *args, **kwargs), x.copies)


@handles(torch.cat, torch.concat, torch.concatenate)
def _cat(func: Any, tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    if not all(isinstance(t, Varied) and t.whole is None and t.copies == first.copies for t in tensors):
        return NotImplemented
    dim %= first.ndim
    if dim == 0 or any(not t.same and t.axis != dim for t in tensors):
        return NotImplemented
    base = torch.cat([t.base for t in tensors], dim)
    if all(t.same for t in tensors):
        return Varied.repeated(base, first.copies)
    offset, units, changed = 0, [], []
    for t in tensors:
        if not t.same:
            units.append(t.units + offset)
            changed.append(t.changed)
        offset += t.shape[dim]
    return Varied(base, first.copies, dim, torch.cat(units), torch.cat(changed, dim + 1))


def _channels_flattened(x: Varied) -> Varied:
    base = x.base.flatten(1)
    if x.same:
        return Varied.repeated(base, x.copies)
    places = x.base[0, 0].numel()
    units = (x.units.unsqueeze(1) * places + torch.arange(places, device=base.device)).flatten()
    return Varied(base, x.copies, 1, units if places > 1 else x.units, x.changed.flatten(2))


def _exact_in_parts(x: Varied) -> bool:
    """Whether a product may be summed from two parts: not in half precision, where two roundings are not one."""
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
