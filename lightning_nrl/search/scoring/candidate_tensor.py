"""`CandidateTensor`: activations of many candidates as a shared base plus the differing channels.

For P candidates and n samples, the model's code sees a tensor of `P * n` samples. Only n samples
and the channels that differ between candidates are stored. Channelwise operations (activations,
batch norm, pooling, sums) run once on the base and once on the differing channels. A Linear or a
convolution runs on the base and adds the effect of the differing channels. Any other operation gets
the whole tensor, so that its result is that of a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

TorchFunction: TypeAlias = Callable[..., Any]

# Computes the result of a torch function; None: the function gets whole tensors instead.
Handler: TypeAlias = Callable[..., Tensor | None]

# Handlers by torch function; `candidate_ops` registers them.
OP_HANDLERS: dict[TorchFunction, Handler] = {}


def named(owner: object, names: str) -> tuple[Any, ...]:
    """Returns attributes of a module or class. `names` are separated by spaces."""
    return tuple(getattr(owner, name) for name in names.split())


PROPERTIES = "shape dtype device ndim layout is_cuda is_nested requires_grad is_sparse"
METADATA_FUNCTIONS = {
    *(attribute.__get__ for attribute in named(Tensor, PROPERTIES)),
    *named(Tensor, "size dim numel is_floating_point is_complex __len__"),
    torch.is_floating_point,
    torch.numel,
}


class CandidateTensor(Tensor):
    """Activations of n samples under P candidates, `P * n x ...`: n rows for each candidate."""

    base: Tensor  # n x ..., values that all candidates share; never changed in place
    axis: int  # channel dimension of `base`, not negative
    units: Tensor  # U int64, the channels in which candidates differ, each once
    copies: int  # P
    changed: Tensor  # P x n x ..., values of the U channels, which are in dimension `axis + 1`
    # The whole tensor, which replaces all fields above; None before it is requested.
    materialized: Tensor | None

    @staticmethod
    def __new__(
        cls, base: Tensor, copies: int, axis: int, units: Tensor, changed: Tensor
    ) -> CandidateTensor:
        shape = (copies * base.shape[0], *base.shape[1:])
        new = Tensor._make_wrapper_subclass(cls, shape, dtype=base.dtype, device=base.device)
        new.base = base
        new.copies = copies
        new.axis = axis
        new.units = units
        new.changed = changed
        new.materialized = None
        return new

    @classmethod
    def repeated(cls, base: Tensor, copies: int) -> CandidateTensor:
        nothing = torch.empty(0, dtype=torch.int64, device=base.device)
        return cls(base, copies, min(1, base.ndim - 1), nothing, nothing)

    @property
    def identical(self) -> bool:
        return self.units.numel() == 0

    @property
    def all_differ(self) -> bool:
        return self.units.numel() == self.base.shape[self.axis]

    def dense(self) -> Tensor:
        """Returns the whole tensor. In-place changes of the result change this tensor."""
        if self.materialized is None:
            if self.all_differ:
                changed = self.changed.movedim(self.axis + 1, 0)
                changed = changed.index_select(0, self.units.argsort())
                dense = changed.movedim(0, self.axis + 1).contiguous()
            else:
                dense = self.base.expand(self.copies, *self.base.shape).clone(
                    memory_format=torch.contiguous_format
                )
                if not self.identical:
                    dense.index_copy_(self.axis + 1, self.units, self.changed)
            self.materialized = dense.flatten(0, 1)
        return self.materialized

    def assign(self, result: Tensor) -> CandidateTensor:
        """Sets this tensor to the result of an in-place operation."""
        if not isinstance(result, CandidateTensor):
            self.materialized = result
            return self
        vars(self).update(vars(result))
        return self

    def map_channels(self, function: Callable[[Tensor, Tensor | None], Tensor]) -> CandidateTensor:
        """Applies a channelwise `function(values, channels)`; None stands for all channels."""
        base = function(self.base, None)
        if base is self.base:
            return self
        if self.identical:
            return CandidateTensor.repeated(base, self.copies)
        changed = function(self.changed.flatten(0, 1), self.units).unflatten(0, (self.copies, -1))
        return CandidateTensor(base, self.copies, self.axis, self.units, changed)

    @classmethod
    def __torch_function__(
        cls,
        func: TorchFunction,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in METADATA_FUNCTIONS:
                return func(*args, **kwargs)
            handler = OP_HANDLERS.get(func)
            if handler is not None and not any(_is_materialized(value) for value in args):
                result = handler(func, *args, **kwargs)
                if result is not None:
                    return result
            result = _on_whole_tensors(func, args, kwargs)
            if args and isinstance(args[0], CandidateTensor) and result is args[0].materialized:
                return args[0]
            return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: TorchFunction,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _on_whole_tensors(func, args, kwargs or {})


def as_dense(x: Tensor) -> Tensor:
    """Returns the whole tensor of a `CandidateTensor`, and any other tensor as it is."""
    return x.dense() if isinstance(x, CandidateTensor) else x


def _is_materialized(value: object) -> bool:
    return isinstance(value, CandidateTensor) and value.materialized is not None


def _on_whole_tensors(func: TorchFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    dense = pytree.tree_map_only(CandidateTensor, CandidateTensor.dense, (args, dict(kwargs)))
    return func(*dense[0], **dense[1])
