"""Recorded passes that look alike: same modules, same shapes but for the number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_nrl._scoring.editable_model import Inputs
from lightning_nrl._scoring.replay_plan import ReplayPlan
from lightning_nrl._scoring.sample_layout import SampleLayout, to_device

__all__ = ["ReplayGroup", "split_inputs"]


class _StoredTensor:
    """Stands where a stored tensor goes."""


STORED_TENSOR = _StoredTensor()


@dataclass
class ReplayGroup:
    """Passes that look alike. Of `parts`, `targets` and `rows` one entry is left when recording is over."""

    plan: ReplayPlan | None  # how they are resumed; None: they are run as a whole
    layouts: list[SampleLayout]  # where the samples are in each stored tensor
    device: torch.device  # where the stored tensors are kept
    spec: pytree.TreeSpec | None = None  # the tree of model inputs, if they are run as a whole
    constants: list[Any] = field(default_factory=list)  # what stands in it where no stored tensor does
    parts: list[list[Tensor]] = field(default_factory=list)  # of each stored tensor, batch by batch
    targets: list[Any] = field(default_factory=list)  # trees of truths, batch by batch, on the CPU
    rows: list[Tensor] = field(default_factory=list)  # in the results, batch by batch

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(x.nbytes for parts in self.parts for x in parts)

    def add(self, stored: Sequence[Tensor], target: Any, rows: Tensor) -> None:
        """Takes in a batch: its stored tensors, the truth and the rows in the results."""
        self.parts = self.parts or [[] for _ in stored]
        for parts, x in zip(self.parts, stored, strict=True):
            parts.append(x.to(self.device))
        self.targets.append(to_device(target, torch.device("cpu")))
        self.rows.append(rows)

    def concatenate(self, pin: bool = False) -> None:
        """Ends the recording; page-locked (`pin`) memory is what a GPU takes without a wait."""
        for parts, layout in zip(self.parts, self.layouts, strict=True):
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, layout.dim)
            parts.clear()  # so that memory is held once
            parts.append(whole.pin_memory() if pin else whole)
        self.rows = [torch.cat(self.rows)]
        self.targets = [
            pytree.tree_map(lambda *xs: torch.cat(xs) if isinstance(xs[0], Tensor) else xs[0], *self.targets)
        ]

    def take(self, samples: slice | Tensor, device: torch.device) -> list[Tensor]:
        """The stored tensors of some samples, on a device."""
        return [self.take_one(i, samples, device) for i in range(len(self.parts))]

    def take_one(self, index: int, samples: slice | Tensor, device: torch.device) -> Tensor:
        """One of them."""
        return self.layouts[index].take(self.parts[index][0], samples).to(device, non_blocking=True)

    def inputs(self, stored: Sequence[Tensor]) -> Inputs:
        """The model inputs, for samples that are run as a whole."""
        source = iter(stored)
        assert self.spec is not None
        args, kwargs = pytree.tree_unflatten(
            [next(source) if c is STORED_TENSOR else c for c in self.constants], self.spec
        )
        return args, kwargs

    def holds_inputs_like(self, other: ReplayGroup, stored: Sequence[Tensor]) -> bool:
        """Whether samples that are run as a whole, of which `stored` is kept, belong to this group too."""
        return (
            self.plan is None
            and self.spec == other.spec
            and len(self.parts) == len(stored)
            and all(a[0].shape[1:] == b.shape[1:] for a, b in zip(self.parts, stored, strict=True))
            and all(_equal(a, b) for a, b in zip(self.constants, other.constants, strict=True))
        )


def split_inputs(inputs: Inputs, n: int, device: torch.device) -> tuple[ReplayGroup, list[Tensor]]:
    """A group for samples that are run as a whole, without any, and what to store of `n` of them."""
    leaves, spec = pytree.tree_flatten((tuple(inputs[0]), dict(inputs[1])))
    stored, constants = [], []
    for x in leaves:
        if isinstance(x, Tensor) and x.ndim > 0 and len(x) == n:
            stored.append(x.clone())
            constants.append(STORED_TENSOR)
        else:
            constants.append(x)
    return ReplayGroup(None, [SampleLayout(0)] * len(stored), device, spec, constants), stored


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b or (type(a) is type(b) and bool(a == b))
