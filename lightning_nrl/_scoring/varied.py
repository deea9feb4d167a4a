"""A tensor of many candidates that says what they share: one base for all, and the channels in which they differ.

What comes after a repaired layer is ordinary Python on ordinary tensors. `Varied` stands in for such a tensor: to the
code it has the samples of all candidates, `P * n` of them; inside it holds `n` samples and the channels that differ.
Operations that treat channels one by one (activations, batch norm, pooling, sums) run on the base once and on the
channels that differ; a Linear or a convolution adds what those channels change to its output for the base. Whatever is
not known here gets the whole tensor, so the result is always that of the plain code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Pending", "Varied"]

HANDLERS: dict[Any, Callable[..., Any]] = {}
"""What to do instead of a function; filled by `channelwise`."""


@dataclass(frozen=True)
class Pending:
    """What differs, before it is computed: a sum of products, whose factors an affine operation can still be put into.

    Attributes:
        onto: `onto(base, scale)` adds the sum to a base `U x n x ...` and gives `U x P x n x ...` in memory of its own;
            each channel's sum is first multiplied by a factor, `U`, unless that is None.
        scale: the factor so far.
    """

    onto: Callable[[Tensor, Tensor | None], Tensor]
    scale: Tensor | None = None

    def times(self, factor: Tensor) -> Pending:
        """The same, each channel times a factor, `U`."""
        return Pending(self.onto, factor if self.scale is None else self.scale * factor)


def _nothing(base: Tensor, scale: Tensor | None) -> Tensor:
    raise AssertionError("candidates that do not differ have no channels that do")


NOTHING = Pending(_nothing)


@cache
def _no_units(device: torch.device) -> Tensor:
    return torch.zeros(0, dtype=torch.int64, device=device)


class Varied(Tensor):
    """`P` candidates' versions of `n` samples, candidate by candidate: to the outside a tensor `P * n x ...`.

    Attributes:
        base: `n x ...`, what all candidates have where they do not differ. Never changed in place.
        axis: the dimension of `base`, counted from the front, that counts channels.
        units: channels that differ, `U` int64, each once.
        copies: P.
        pending: what is added to the base in those channels, not yet computed; None once it is.
        whole: the whole tensor, once something has asked for it; from then on it alone counts.
    """

    base: Tensor
    axis: int
    units: Tensor
    copies: int
    pending: Pending | None
    values_changed: Tensor | None
    whole: Tensor | None

    @staticmethod
    def __new__(cls, base: Tensor, copies: int, axis: int, units: Tensor, changed: Tensor | Pending) -> Varied:
        shape = (copies * base.shape[0], *base.shape[1:])
        new = Tensor._make_wrapper_subclass(cls, shape, dtype=base.dtype, device=base.device)
        new.base, new.copies, new.axis, new.units, new.whole = base, copies, axis, units, None
        new.pending = changed if isinstance(changed, Pending) else None
        new.values_changed = None if isinstance(changed, Pending) else changed
        return new

    @classmethod
    def repeated(cls, base: Tensor, copies: int) -> Varied:
        """The same for all candidates."""
        return cls(base, copies, min(1, base.ndim - 1), _no_units(base.device), NOTHING)

    @property
    def changed(self) -> Tensor:
        """The values of the channels that differ, `P x n x ...` with `U` channels at `axis + 1`."""
        if self.values_changed is None:
            self.values_changed, self.pending = self.evaluated(), None
        return self.values_changed

    def evaluated(self) -> Tensor:
        """What is pending, computed, in memory of its own."""
        assert self.pending is not None
        base = self.base.index_select(self.axis, self.units).movedim(self.axis, 0)
        return self.pending.onto(base, self.pending.scale).movedim(0, self.axis + 1)

    @property
    def same(self) -> bool:
        """Whether the candidates do not differ at all."""
        return self.units.numel() == 0

    @property
    def all_differ(self) -> bool:
        """Whether the candidates differ in every channel, so that nothing of the base is left."""
        return self.units.numel() == self.base.shape[self.axis]

    def dense(self) -> Tensor:
        """The whole tensor, in memory of its own; changing it changes this."""
        if self.whole is None:
            base, dim = self.base, self.axis
            if self.all_differ:
                whole = self.changed.index_select(dim + 1, self.units.argsort())
            else:
                whole = base.expand(self.copies, *base.shape).clone(memory_format=torch.contiguous_format)
                if not self.same:
                    whole.index_copy_(dim + 1, self.units, self.changed)
            self.whole = whole.flatten(0, 1)
        return self.whole

    def become(self, other: Any) -> Varied:
        """Takes over another's contents, for an operation in place."""
        if isinstance(other, Varied):
            self.base, self.axis, self.units, self.whole = other.base, other.axis, other.units, other.whole
            self.pending, self.values_changed = other.pending, other.values_changed
        else:
            self.whole = other
        return self

    def each(self, function: Callable[[Tensor, Tensor | None], Tensor]) -> Varied:
        """Applies a function of samples and their channels (None for all) that treats both one by one."""
        base = function(self.base, None)
        if self.same:
            return Varied.repeated(base, self.copies)
        changed = function(self.changed.flatten(0, 1), self.units).unflatten(0, (self.copies, -1))
        return Varied(base, self.copies, self.axis, self.units, changed)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in METADATA:
                return func(*args, **kwargs)
            handler = HANDLERS.get(func)
            if handler is not None and not any(isinstance(a, Varied) and a.whole is not None for a in args):
                result = handler(func, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            whole = pytree.tree_map_only(Varied, Varied.dense, (args, kwargs))
            out = func(*whole[0], **whole[1])
            if args and isinstance(args[0], Varied) and out is args[0].whole:
                return args[0]
            return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        dense = Varied.dense
        return func(*pytree.tree_map_only(Varied, dense, args), **pytree.tree_map_only(Varied, dense, kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Varied({list(self.shape)}, copies={self.copies}, differing={self.units.numel()} at {self.axis})"


METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_nested", "requires_grad", "is_sparse")
    ),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "is_complex", "__len__")),
    torch.is_floating_point,
    torch.numel,
}


def handles(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what to do instead of some functions; a handler may return `NotImplemented`."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register
