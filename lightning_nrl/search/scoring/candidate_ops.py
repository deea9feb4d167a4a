"""Operations on `CandidateTensor`: one run for the shared base, and one for the differing channels
of
all candidates.

Channelwise operations come first, then Linear and convolution, which mix channels, then sums and
products. A handler gets the torch function and its arguments. If a handler returns
`NotImplemented`, the function gets whole tensors.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl.search.scoring.candidate_tensor import OP_HANDLERS, CandidateTensor

Handler = Callable[..., Any]


def _named(owner: Any, names: str) -> tuple[Any, ...]:
    return tuple(getattr(owner, name) for name in names.split())


RELU = (F.relu, torch.relu, Tensor.relu)
ACTIVATIONS = RELU + _named(
    F,
    "relu6 gelu silu mish elu selu celu leaky_relu softplus logsigmoid hardtanh hardswish hardsigmoid sigmoid tanh "
    "threshold",
)
INPLACE_METHODS = (torch.relu_, *_named(Tensor, "relu_ sigmoid_ tanh_ clamp_"))
POINTWISE = (
    *(
        *ACTIVATIONS,
        *INPLACE_METHODS,
        *_named(torch, "sigmoid tanh clamp exp sqrt square abs clone"),
    ),
    *_named(
        Tensor,
        "sigmoid tanh clamp exp sqrt square abs pow __pow__ __neg__ float double half bfloat16 to type",
    ),
    *_named(Tensor, "detach clone contiguous"),
)
ADAPTIVE_MEANS = _named(F, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")
POOLS = (
    *ADAPTIVE_MEANS,
    *_named(F, "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d interpolate"),
    *(
        *_named(F, "adaptive_max_pool1d adaptive_max_pool2d"),
        *_named(torch, "max_pool1d max_pool2d max_pool3d"),
    ),
)
MEANS = (torch.mean, Tensor.mean)
REDUCTIONS = (*MEANS, torch.sum, torch.amax, Tensor.sum, Tensor.amax)
ADDITIONS = (torch.add, *_named(Tensor, "add __add__ __radd__"))
OPERATIONS = (
    *(
        *ADDITIONS,
        *_named(torch, "sub mul div true_divide"),
        *_named(Tensor, "sub __sub__ __rsub__ mul __mul__"),
    ),
    *_named(Tensor, "__rmul__ div true_divide __truediv__ __rtruediv__"),
)
IN_PLACE = {
    **{
        getattr(Tensor, f"__i{name}__"): getattr(operator, name)
        for name in ("add", "sub", "mul", "truediv")
    },
    **{getattr(Tensor, f"{name}_"): getattr(torch, name) for name in ("add", "sub", "mul")},
}
"""Maps each in-place operation to its out-of-place version."""


def _inplace_position(function: Any) -> int | None:
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except (ValueError, TypeError):
        return None


INPLACE_POSITIONS = {function: _inplace_position(function) for function in ACTIVATIONS}


def handles(
    *functions: Any, alone: bool = True, axis: int | None = None
) -> Callable[[Handler], Handler]:
    """Returns a decorator that registers a handler for some torch functions.

    With `alone`, the handler is called only if the first argument, but no other, is a
    `CandidateTensor`. If `axis` is given, the channels of this tensor must also be in that
    dimension. Otherwise the torch function gets whole tensors. Without `alone`, the handler is
    called if any argument is a `CandidateTensor`, and `axis` has no effect.
    """

    def register(handler: Handler) -> Handler:
        def checked(func: Any, *args: Any, **kwargs: Any) -> Any:
            x, *others = args or (None,)
            if not isinstance(x, CandidateTensor) or (axis is not None and x.axis != axis):
                return NotImplemented
            if any(isinstance(a, CandidateTensor) for a in (*others, *kwargs.values())):
                return NotImplemented
            return handler(func, *args, **kwargs)

        OP_HANDLERS.update(dict.fromkeys(functions, checked if alone else handler))
        return handler

    return register


@handles(*POINTWISE)
def _pointwise(func: Any, x: CandidateTensor, *rest: Any, **kwargs: Any) -> Any:
    if any(isinstance(a, Tensor) for a in (*rest, *kwargs.values())):
        return NotImplemented
    position = INPLACE_POSITIONS.get(func)
    flagged = position is not None and (kwargs.get("inplace") or any(rest[position - 1 : position]))
    if flagged or func in INPLACE_METHODS:
        return x.assign(
            x.map_channels(
                lambda t, units: func(t.clone() if units is None else t, *rest, **kwargs)
            )
        )
    if func in RELU and x.pending is not None:
        return CandidateTensor(torch.relu(x.base), x.copies, x.axis, x.units, x.evaluated().relu_())
    return x.map_channels(lambda t, _: func(t, *rest, **kwargs))


@handles(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout)
def _dropout(
    func: Any, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    return NotImplemented if training and p else x


@handles(F.batch_norm, axis=1)
def _batch_norm(
    func: Any,
    x: CandidateTensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training:
        return NotImplemented

    def normalised(t: Tensor, units: Tensor | None) -> Tensor:
        vectors = [
            v if v is None or units is None else v.index_select(0, units)
            for v in (mean, var, weight, bias)
        ]
        return F.batch_norm(t, vectors[0], vectors[1], vectors[2], vectors[3], False, momentum, eps)

    if x.pending is not None and var is not None:
        factor = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
        pending = x.pending.times(factor.to(x.dtype).index_select(0, x.units))
        return CandidateTensor(normalised(x.base, None), x.copies, x.axis, x.units, pending)
    return x.map_channels(normalised)


@handles(*POOLS, axis=1)
def _pool(func: Any, x: CandidateTensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("return_indices") or any(a is True for a in args[5:]):
        return NotImplemented
    if func in ADAPTIVE_MEANS and not kwargs and args in ((1,), ((1,) * (x.ndim - 2),)):
        return _spatial_mean(x, keepdim=True)
    return x.map_channels(lambda t, _: func(t, *args, **kwargs))


@handles(*REDUCTIONS)
def _reduce(func: Any, x: CandidateTensor, *args: Any, **kwargs: Any) -> Any:
    dims = args[0] if args else kwargs.get("dim")
    places = {d % x.ndim for d in ((dims,) if isinstance(dims, int) else dims or (0,))}
    if min(places) <= x.axis:
        return NotImplemented
    if (
        func in MEANS
        and len(args) < 3
        and kwargs.keys() <= {"dim", "keepdim"}
        and len(places) == x.ndim - 1 - x.axis
    ):
        return _spatial_mean(x, keepdim=bool(args[1] if len(args) > 1 else kwargs.get("keepdim")))
    return x.map_channels(lambda t, _: func(t, *args, **kwargs))


def _spatial_mean(x: CandidateTensor, keepdim: bool) -> CandidateTensor:
    dims = tuple(range(x.axis + 1, x.ndim))

    def mean(t: Tensor, units: Tensor | None) -> Tensor:
        flat = t.movedim(x.axis, 0).flatten(2) if units is not None and x.axis == 1 else None
        fits = (
            flat is not None
            and flat.is_contiguous()
            and t.numel()
            and t.dtype in (torch.float32, torch.float64)
        )
        if flat is None or not fits or t.device.type != "cpu":
            return t.mean(dims, keepdim)
        n = flat.shape[-1]
        # For few contiguous numbers this product is several times as fast as `mean`.
        found = torch.mv(flat.view(-1, n), flat.new_full((n,), 1 / n)).view(flat.shape[:2]).t()
        return found.view(*found.shape, *[1] * len(dims)) if keepdim else found

    return x.map_channels(mean)


@handles(torch.flatten, Tensor.flatten)
def _flatten(func: Any, x: CandidateTensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    if end_dim % x.ndim != x.ndim - 1:
        return NotImplemented
    start = start_dim % x.ndim
    if start == 1 and x.axis == 1:
        return _flatten_channels(x)
    return x.map_channels(lambda t, _: t.flatten(start)) if start > x.axis else NotImplemented


@handles(Tensor.view, Tensor.reshape, torch.reshape, axis=1)
def _view(func: Any, x: CandidateTensor, *shape: Any) -> Any:
    if not shape or isinstance(shape[0], torch.dtype):
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
    return CandidateTensor(
        base, x.copies, 1, units if places > 1 else x.units, x.changed.flatten(2)
    )


@handles(F.linear)
def _linear(func: Any, x: CandidateTensor, weight: Tensor, bias: Tensor | None = None) -> Any:
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
    x: CandidateTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if x.identical:
        return CandidateTensor.repeated(
            func(x.base, weight, bias, stride, padding, dilation, groups), x.copies
        )
    if groups == x.shape[1] == len(weight) and x.axis == 1:

        def depthwise(t: Tensor, units: Tensor | None) -> Tensor:
            own = [
                w if w is None or units is None else w.index_select(0, units)
                for w in (weight, bias)
            ]
            out: Tensor = func(t, *own, stride, padding, dilation, t.shape[1])
            return out

        return x.map_channels(depthwise)
    if groups != 1 or x.axis != 1:
        return NotImplemented
    if x.all_differ:
        return func(
            x.changed.flatten(0, 1),
            weight.index_select(1, x.units),
            bias,
            stride,
            padding,
            dilation,
        )
    if not _is_exact_in_parts(x):
        return NotImplemented
    base = func(x.base, weight, bias, stride, padding, dilation)
    change = (x.changed - x.base.index_select(1, x.units)).flatten(0, 1)
    delta = func(change, weight.index_select(1, x.units), None, stride, padding, dilation)
    return delta.unflatten(0, (x.copies, -1)).add_(base).flatten(0, 1)


@handles(F.layer_norm, F.group_norm, F.embedding, F.prelu)
def _samplewise(func: Any, x: CandidateTensor, *args: Any, **kwargs: Any) -> Any:
    return (
        CandidateTensor.repeated(func(x.base, *args, **kwargs), x.copies)
        if x.identical
        else NotImplemented
    )


@handles(torch.cat, torch.concat, torch.concatenate, alone=False)
def _cat(func: Any, tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    if not all(
        isinstance(t, CandidateTensor) and t.materialized is None and t.copies == first.copies
        for t in tensors
    ):
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
    """True if a product may be computed as the sum of two products: in float32 or float64, without
    autocast.
    """
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(
        x.device.type
    )


@handles(*OPERATIONS, *IN_PLACE, alone=False)
def _binary(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if "out" in kwargs:
        return NotImplemented
    in_place, apply = func in IN_PLACE, IN_PLACE.get(func, func)
    if not isinstance(a, CandidateTensor):
        return (
            _onto_plain(apply, a, b, in_place, kwargs) if isinstance(a, Tensor) else NotImplemented
        )
    if isinstance(b, CandidateTensor):
        out = _add_identical(apply, a, b, kwargs)
        if out is NotImplemented:
            out = _both_candidates(lambda s, t: apply(s, t, **kwargs), a, b)
    elif isinstance(b, Tensor) and b.ndim:
        out = _with_plain(lambda s, t: apply(s, t, **kwargs), a, b)
    else:
        out = a.map_channels(lambda t, _: apply(t, b, **kwargs))
    if out is NotImplemented or not in_place:
        return out
    return a.assign(out) if out.shape == a.shape and out.dtype == a.dtype else NotImplemented


def _add_identical(
    apply: Callable[..., Any], a: CandidateTensor, b: CandidateTensor, kwargs: dict[str, Any]
) -> Any:
    """Adds a tensor that all candidates share to a tensor with a pending difference, which stays
    pending.
    """
    if (
        kwargs
        or apply not in (*ADDITIONS, operator.add)
        or a.shape != b.shape
        or a.copies != b.copies
    ):
        return NotImplemented
    for x, other in ((a, b), (b, a)):
        if x.pending is not None and other.identical and x.dtype == other.dtype:
            return CandidateTensor(a.base + b.base, a.copies, x.axis, x.units, x.pending)
    return NotImplemented


def _both_candidates(
    apply: Callable[[Tensor, Tensor], Tensor], a: CandidateTensor, b: CandidateTensor
) -> Any:
    if a.copies != b.copies or a.ndim != b.ndim or len(a.base) != len(b.base):
        return NotImplemented
    if a.identical and b.identical:
        return CandidateTensor.repeated(apply(a.base, b.base), a.copies)
    dim = b.axis if a.identical else a.axis
    if (not a.identical and not b.identical and a.axis != b.axis) or a.base.shape[
        dim
    ] != b.base.shape[dim]:
        return NotImplemented
    units = b.units if a.identical else a.units
    if not a.identical and not b.identical and a.units is not b.units:
        units = torch.cat([a.units, b.units]).unique()
    changed = apply(_channels(a, dim, units), _channels(b, dim, units))
    return CandidateTensor(apply(a.base, b.base), a.copies, dim, units, changed)


def _channels(x: CandidateTensor, dim: int, units: Tensor) -> Tensor:
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
        return apply(
            t,
            b
            if units is None or place < 0 or b.shape[place] == 1
            else b.index_select(place, units),
        )

    return (
        a.map_channels(one)
        if torch.broadcast_shapes(a.shape, b.shape) == a.shape
        else NotImplemented
    )


def _onto_plain(
    apply: Any, a: Tensor, b: CandidateTensor, in_place: bool, kwargs: dict[str, Any]
) -> Any:
    if not b.identical or a.shape != b.shape:
        return NotImplemented
    out = apply(a.unflatten(0, (b.copies, -1)), b.base.unsqueeze(0), **kwargs).flatten(0, 1)
    return a.copy_(out) if in_place else out
