"""Operations on `CandidateTensor`: one run for the shared base, one for the differing channels.

Channelwise operations come first, then Linear and convolution, which mix channels, then sums and
products. A handler gets the torch function and its arguments. If a handler returns None, the
function gets whole tensors.

A search on whole tensors (the cost of `torch.func.vmap`, too) takes longer on a CPU. If the changed
weights lie in all channels of a layer, it takes 2.2 times as long in the last block of a residual
network, 1.7 in that of a densely connected one, 1.2 to 1.3 in a multilayer perceptron or a
transformer block, and 1 in a convolution before another one. If they lie in few channels, it takes
15, 2.2, 1.4 to 2.1 and 1 to 3 times as long. Without one of `_conv`, `_cat`, `_binary`, `_linear`,
`_pool`, `_flatten` and `_batch_norm`, one of these networks takes 1.2 to 3.6 times as long.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_nrl.search.scoring.candidate_tensor import (
    OP_HANDLERS,
    CandidateTensor,
    Handler,
    TorchFunction,
    named,
)

ACTIVATIONS = named(
    F,
    "relu relu6 gelu silu mish elu selu celu leaky_relu softplus logsigmoid hardtanh hardswish "
    "hardsigmoid sigmoid tanh threshold dropout dropout1d dropout2d dropout3d alpha_dropout",
)
INPLACE_METHODS = (torch.relu_, *named(Tensor, "relu_ sigmoid_ tanh_ clamp_"))
POINTWISE = (
    *ACTIVATIONS,
    *INPLACE_METHODS,
    *named(torch, "relu sigmoid tanh clamp exp sqrt square abs clone dropout"),
    *named(Tensor, "relu sigmoid tanh clamp exp sqrt square abs pow __pow__ __neg__ float double"),
    *named(Tensor, "half bfloat16 to type detach clone contiguous"),
)
POOLS = (
    *named(F, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    *named(F, "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d interpolate"),
    *named(F, "adaptive_max_pool1d adaptive_max_pool2d"),
    *named(torch, "max_pool1d max_pool2d max_pool3d"),
)
REDUCTIONS = (*named(torch, "mean sum amax"), *named(Tensor, "mean sum amax"))
OPERATIONS = (
    operator.add,
    *named(torch, "add sub mul div true_divide"),
    *named(Tensor, "add __add__ __radd__ sub __sub__ __rsub__ mul __mul__ __rmul__"),
    *named(Tensor, "div true_divide __truediv__ __rtruediv__"),
)
# In-place operations and their out-of-place versions.
IN_PLACE: dict[TorchFunction, TorchFunction] = {
    Tensor.__iadd__: operator.add,
    Tensor.__isub__: operator.sub,
    Tensor.__imul__: operator.mul,
    Tensor.__itruediv__: operator.truediv,
    Tensor.add_: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.mul_: torch.mul,
}


def handles(*functions: TorchFunction, axis: int | None = None) -> Callable[[Handler], Handler]:
    """Returns a decorator that registers a handler for some torch functions.

    The handler is called only if the first argument, but no other, is a `CandidateTensor`, with its
    channels in `axis` if given.
    """

    def register(handler: Handler) -> Handler:
        def checked(func: TorchFunction, *args: Any, **kwargs: Any) -> Tensor | None:
            if not args or not isinstance(args[0], CandidateTensor):
                return None
            if axis is not None and args[0].axis != axis:
                return None
            if any(isinstance(value, CandidateTensor) for value in (*args[1:], *kwargs.values())):
                return None
            return handler(func, *args, **kwargs)

        return handles_any(*functions)(checked)

    return register


def handles_any(*functions: TorchFunction) -> Callable[[Handler], Handler]:
    """Returns a decorator that registers a handler for any `CandidateTensor` in the arguments."""

    def register(handler: Handler) -> Handler:
        OP_HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


@handles(*POINTWISE)
def _pointwise(
    func: TorchFunction, x: CandidateTensor, *args: object, **kwargs: object
) -> Tensor | None:
    if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        return None
    # No activation has another flag than `inplace`.
    has_flag = any(value is True for value in (*args, kwargs.get("inplace")))
    if func in INPLACE_METHODS or (func in ACTIVATIONS and has_flag):
        # All candidates share the base, which must stay.
        return x.assign(x.map_channels(lambda t, _: func(t.clone(), *args, **kwargs)))
    return x.map_channels(lambda t, _: func(t, *args, **kwargs))


@handles(F.batch_norm, axis=1)
def _batch_norm(
    func: TorchFunction,
    x: CandidateTensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    def normalised(t: Tensor, units: Tensor | None) -> Tensor:
        parts = [_select(part, units) for part in (mean, var, weight, bias)]
        result: Tensor = func(t, *parts, training, momentum, eps)
        return result

    return x.map_channels(normalised)


def _select(x: Tensor | None, units: Tensor | None) -> Tensor | None:
    return x if x is None or units is None else x.index_select(0, units)


@handles(*POOLS, axis=1)
def _pool(
    func: TorchFunction, x: CandidateTensor, *args: object, **kwargs: object
) -> Tensor | None:
    if kwargs.get("return_indices") or any(value is True for value in args[5:]):
        return None
    return x.map_channels(lambda t, _: func(t, *args, **kwargs))


@handles(*REDUCTIONS)
def _reduce(func: TorchFunction, x: CandidateTensor, *args: Any, **kwargs: Any) -> Tensor | None:
    dims = args[0] if args else kwargs.get("dim")
    if isinstance(dims, int):
        dims = (dims,)
    reduced = {dim % x.ndim for dim in dims or (0,)}
    if min(reduced) <= x.axis:
        return None
    return x.map_channels(lambda t, _: func(t, *args, **kwargs))


@handles(torch.flatten, Tensor.flatten)
def _flatten(
    func: TorchFunction, x: CandidateTensor, start_dim: int = 0, end_dim: int = -1
) -> Tensor | None:
    if start_dim != 1 or end_dim % x.ndim != x.ndim - 1 or x.axis != 1:
        return None
    return _flatten_channels(x)


@handles(Tensor.view, Tensor.reshape, torch.reshape, axis=1)
def _view(func: TorchFunction, x: CandidateTensor, *shape: Any) -> Tensor | None:
    if not shape or isinstance(shape[0], torch.dtype):
        return None
    sizes = tuple(shape[0]) if isinstance(shape[0], (tuple, list)) else shape
    n_features = x.base[0].numel()
    if sizes in ((x.shape[0], -1), (-1, n_features), (x.shape[0], n_features)):
        return _flatten_channels(x)
    return None


def _flatten_channels(x: CandidateTensor) -> CandidateTensor:
    base = x.base.flatten(1)
    if x.identical:
        return CandidateTensor.repeated(base, x.copies)
    n_places = x.base[0, 0].numel()
    units = x.units
    if n_places > 1:
        place = torch.arange(n_places, device=base.device)
        units = (units.unsqueeze(1) * n_places + place).flatten()
    return CandidateTensor(base, x.copies, 1, units, x.changed.flatten(2))


@handles(F.linear)
def _linear(
    func: TorchFunction, x: CandidateTensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    if x.identical:
        return CandidateTensor.repeated(F.linear(x.base, weight, bias), x.copies)
    if x.axis != x.ndim - 1:
        return None
    weight_of_units = weight.index_select(1, x.units)
    if x.all_differ:
        return F.linear(x.changed, weight_of_units, bias).flatten(0, 1)
    if not _is_exact_in_parts(x):
        return None
    delta = (x.changed - x.base.index_select(x.axis, x.units)) @ weight_of_units.t()
    return delta.add_(F.linear(x.base, weight, bias)).flatten(0, 1)


@handles(torch.conv1d, torch.conv2d, torch.conv3d, axis=1)
def _conv(
    func: TorchFunction,
    x: CandidateTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    def convolve(t: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        result: Tensor = func(t, weight, bias, stride, padding, dilation, groups)
        return result

    if x.identical:
        return CandidateTensor.repeated(convolve(x.base, weight, bias, groups), x.copies)
    if groups == x.shape[1] == len(weight):  # a depthwise convolution

        def depthwise(t: Tensor, units: Tensor | None) -> Tensor:
            weight_of_units = weight if units is None else weight.index_select(0, units)
            return convolve(t, weight_of_units, _select(bias, units), t.shape[1])

        return x.map_channels(depthwise)
    if groups != 1:
        return None
    weight_of_units = weight.index_select(1, x.units)
    if x.all_differ:
        return convolve(x.changed.flatten(0, 1), weight_of_units, bias)
    if not _is_exact_in_parts(x):
        return None
    base = convolve(x.base, weight, bias)
    change = (x.changed - x.base.index_select(1, x.units)).flatten(0, 1)
    delta: Tensor = convolve(change, weight_of_units, None).unflatten(0, (x.copies, -1))
    return delta.add_(base).flatten(0, 1)


def _is_exact_in_parts(x: CandidateTensor) -> bool:
    """True if a product may be computed as the sum of two products."""
    is_wide = x.dtype in (torch.float32, torch.float64)
    return is_wide and not torch.is_autocast_enabled(x.device.type)


@handles_any(torch.cat, torch.concat, torch.concatenate)
def _cat(func: TorchFunction, tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    parts = [t for t in tensors if isinstance(t, CandidateTensor) and t.materialized is None]
    if len(parts) < len(tensors):
        return None
    copies = parts[0].copies
    dim %= parts[0].ndim
    differing = [part for part in parts if not part.identical]
    if dim == 0 or any(part.copies != copies for part in parts):
        return None
    if any(part.axis != dim for part in differing):
        return None
    base = torch.cat([part.base for part in parts], dim)
    if not differing:
        return CandidateTensor.repeated(base, copies)
    offset, units = 0, []
    for part in parts:
        units.append(part.units + offset)
        offset += part.shape[dim]
    changed = torch.cat([part.changed for part in differing], dim + 1)
    return CandidateTensor(base, copies, dim, torch.cat(units), changed)


@handles_any(*OPERATIONS, *IN_PLACE)
def _binary(func: TorchFunction, a: Any, b: Any, **kwargs: Any) -> Tensor | None:
    if "out" in kwargs:
        return None

    def apply(s: Any, t: Any) -> Tensor:
        result: Tensor = IN_PLACE.get(func, func)(s, t, **kwargs)
        return result

    result: Tensor | None
    if not isinstance(a, CandidateTensor):
        return None
    if isinstance(b, CandidateTensor):
        result = _of_two(apply, a, b)
    elif isinstance(b, Tensor) and b.ndim:
        result = _with_plain(apply, a, b)
    else:
        result = a.map_channels(lambda t, _: apply(t, b))
    if result is None or func not in IN_PLACE:
        return result
    fits = result.shape == a.shape and result.dtype == a.dtype
    return a.assign(result) if fits else None


def _of_two(
    apply: Callable[[Tensor, Tensor], Tensor], a: CandidateTensor, b: CandidateTensor
) -> CandidateTensor | None:
    if a.copies != b.copies or a.ndim != b.ndim or len(a.base) != len(b.base):
        return None
    base = apply(a.base, b.base)
    if a.identical and b.identical:
        return CandidateTensor.repeated(base, a.copies)
    differing = b if a.identical else a
    dim, units = differing.axis, differing.units
    if a.base.shape[dim] != b.base.shape[dim]:
        return None
    if not b.identical and b.units is not units:
        return None
    changed = apply(_channels(a, dim, units), _channels(b, dim, units))
    return CandidateTensor(base, a.copies, dim, units, changed)


def _channels(x: CandidateTensor, dim: int, units: Tensor) -> Tensor:
    if x.identical:
        return x.base.index_select(dim, units).unsqueeze(0)
    return x.changed


def _with_plain(
    apply: Callable[[Tensor, Tensor], Tensor], a: CandidateTensor, b: Tensor
) -> Tensor | None:
    if b.ndim > a.ndim or (b.ndim == a.ndim and len(b) != 1):
        return None
    if torch.broadcast_shapes(a.shape, b.shape) != a.shape:
        return None
    axis = a.axis - (a.ndim - b.ndim)  # the channel dimension of `b`
    has_channels = axis >= 0 and b.shape[axis] != 1

    def with_channels(t: Tensor, units: Tensor | None) -> Tensor:
        if units is None or not has_channels:
            return apply(t, b)
        return apply(t, b.index_select(axis, units))

    return a.map_channels(with_channels)
