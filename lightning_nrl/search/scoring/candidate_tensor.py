"""`CandidateTensor`: activations of many candidates as one shared base plus the channels in which
they
differ.

For P candidates and n samples, the model's code sees a tensor of `P * n` samples. Only n samples
and the channels that differ between candidates are stored. Channelwise operations (activations,
batch norm, pooling, sums) run once on the base and once on the differing channels. A Linear or a
convolution runs on the base and adds the effect of the differing channels. Any other operation gets
the whole tensor, so that its result is that of a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

OP_HANDLERS: dict[
    Any, Callable[..., Any]
] = {}  # by torch function; `candidate_ops` registers handlers


@dataclass(frozen=True)
class LazyDelta:
    """Change of U channels under P candidates. It is computed late, so that a scale per channel can
    be
    included.

    For n samples `onto(base, scale)` returns `base + scale * change` as a new tensor `U x P x n x
    ...`. `base` is `U x n x ...`, the part of `CandidateTensor.base` in the U channels. `scale` is
    a factor per channel, `U`, or None.
    """

    onto: Callable[[Tensor, Tensor | None], Tensor]
    scale: Tensor | None = None

    def times(self, factor: Tensor) -> LazyDelta:
        return LazyDelta(self.onto, factor if self.scale is None else self.scale * factor)


class CandidateTensor(Tensor):
    """Activations of n samples under P candidates, `P * n x ...`: n rows for each candidate in
    turn.
    """

    base: Tensor  # n x ..., values that all candidates share; never changed in place
    axis: int  # channel dimension of `base`, not negative
    units: Tensor  # U int64, the channels in which candidates differ, each once
    copies: int  # P
    pending: LazyDelta | None  # difference of the U channels from the base; None if it is computed
    computed: (
        Tensor | None
    )  # P x n x ..., values of the U channels; None if they are not computed yet
    materialized: (
        Tensor | None
    )  # the whole tensor, which replaces all fields above; None before it is requested

    @staticmethod
    def __new__(
        cls, base: Tensor, copies: int, axis: int, units: Tensor, changed: Tensor | LazyDelta | None
    ) -> CandidateTensor:
        shape = (copies * base.shape[0], *base.shape[1:])
        new = Tensor._make_wrapper_subclass(cls, shape, dtype=base.dtype, device=base.device)
        new.base, new.copies, new.axis, new.units, new.materialized = (
            base,
            copies,
            axis,
            units,
            None,
        )
        new.pending = changed if isinstance(changed, LazyDelta) else None
        new.computed = None if isinstance(changed, LazyDelta) else changed
        return new

    @classmethod
    def repeated(cls, base: Tensor, copies: int) -> CandidateTensor:
        return cls(
            base,
            copies,
            min(1, base.ndim - 1),
            torch.empty(0, dtype=torch.int64, device=base.device),
            None,
        )

    @property
    def changed(self) -> Tensor:
        """Values of the differing channels, `P x n x ...`. Dimension `axis + 1` stands for the U
        channels.
        """
        if self.computed is None:
            self.computed, self.pending = self.evaluated(), None
        return self.computed

    def evaluated(self) -> Tensor:
        assert self.pending is not None
        base = self.base.index_select(self.axis, self.units).movedim(self.axis, 0)
        return self.pending.onto(base, self.pending.scale).movedim(0, self.axis + 1)

    @property
    def identical(self) -> bool:
        return self.units.numel() == 0

    @property
    def all_differ(self) -> bool:
        return self.units.numel() == self.base.shape[self.axis]

    def dense(self) -> Tensor:
        """Returns the whole tensor. In-place changes of the result change this tensor."""
        if self.materialized is None:
            base, dim = self.base, self.axis
            if self.all_differ:
                whole = self._all_changed().contiguous()
            else:
                whole = base.expand(self.copies, *base.shape).clone(
                    memory_format=torch.contiguous_format
                )
                if not self.identical:
                    whole.index_copy_(dim + 1, self.units, self.changed)
            self.materialized = whole.flatten(0, 1)
        return self.materialized

    def dense_view(self) -> Tensor:
        """Returns the whole tensor, which need not be contiguous and must not be changed."""
        if self.materialized is None and self.all_differ:
            return self._all_changed().flatten(0, 1)
        return self.dense()

    def _all_changed(self) -> Tensor:
        dim = self.axis + 1
        return self.changed.movedim(dim, 0).index_select(0, self.units.argsort()).movedim(0, dim)

    def assign(self, other: Any) -> CandidateTensor:
        if isinstance(other, CandidateTensor):
            self.base, self.axis, self.units = other.base, other.axis, other.units
            self.pending, self.computed, self.materialized = (
                other.pending,
                other.computed,
                other.materialized,
            )
        else:
            self.materialized = other
        return self

    def map_channels(self, function: Callable[[Tensor, Tensor | None], Tensor]) -> CandidateTensor:
        """Applies a channelwise `function(values, channels)`. `channels` are indices; None means
        all channels.
        """
        base = function(self.base, None)
        if self.identical:
            return CandidateTensor.repeated(base, self.copies)
        changed = function(self.changed.flatten(0, 1), self.units).unflatten(0, (self.copies, -1))
        return CandidateTensor(base, self.copies, self.axis, self.units, changed)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in METADATA_FUNCTIONS:
                return func(*args, **kwargs)
            handler = OP_HANDLERS.get(func)
            if handler is not None and not any(
                isinstance(a, CandidateTensor) and a.materialized is not None for a in args
            ):
                result = handler(func, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            whole = pytree.tree_map_only(CandidateTensor, CandidateTensor.dense, (args, kwargs))
            out = func(*whole[0], **whole[1])
            if args and isinstance(args[0], CandidateTensor) and out is args[0].materialized:
                return args[0]
            return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        whole = pytree.tree_map_only(CandidateTensor, CandidateTensor.dense, (args, kwargs or {}))
        return func(*whole[0], **whole[1])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CandidateTensor({list(self.shape)}, copies={self.copies}, differing={self.units.numel()} at {self.axis})"


METADATA_FUNCTIONS = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "device",
            "ndim",
            "layout",
            "is_cuda",
            "is_nested",
            "requires_grad",
            "is_sparse",
        )
    ),
    *(
        getattr(Tensor, name)
        for name in ("size", "dim", "numel", "is_floating_point", "is_complex", "__len__")
    ),
    torch.is_floating_point,
    torch.numel,
}
