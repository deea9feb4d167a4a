"""Recorded passes that look alike: same modules, same shapes but for the number of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_nrl._scoring.editable_model import Inputs
from lightning_nrl._scoring.recorded_tensors import InMemory, MappedFile, Recomputed, RecordedTensors, StorageKind
from lightning_nrl._scoring.replay_plan import ReplayPlan
from lightning_nrl._scoring.sample_layout import SampleLayout, to_device

__all__ = ["Recompute", "ReplayGroup", "split_inputs"]

Recompute = Callable[[Tensor], list[Tensor]]
"""Makes the stored tensors of samples again, by their rows in the results."""


class _StoredTensor:
    """Stands where a stored tensor goes."""


STORED_TENSOR = _StoredTensor()


@dataclass
class ReplayGroup:
    """Passes that look alike. Of `targets` and `rows` one entry is left when recording is over."""

    plan: ReplayPlan | None  # how they are resumed; None: they are run as a whole
    layouts: list[SampleLayout]  # where the samples are in each stored tensor
    device: torch.device  # where the stored tensors are kept
    spec: pytree.TreeSpec | None = None  # the tree of model inputs, if they are run as a whole
    constants: list[Any] = field(default_factory=list)  # what stands in it where no stored tensor does
    kind: StorageKind = "memory"
    same: tuple[int, ...] = ()  # for each stored tensor the first one that is equal to it, itself where none is
    shapes: list[torch.Size] = field(default_factory=list)  # of the stored tensors without their first dimension
    storage: RecordedTensors | None = None  # of those that differ; None before the first batch
    expected: int = 0  # samples that are about to come, as far as that is known
    targets: list[Any] = field(default_factory=list)  # trees of truths, batch by batch, on the CPU
    rows: list[Tensor] = field(default_factory=list)  # in the results, batch by batch

    @property
    def nbytes(self) -> int:
        """Bytes of memory for what is stored."""
        return 0 if self.storage is None else self.storage.nbytes

    def empty_like(self, kind: StorageKind, device: torch.device, same: tuple[int, ...]) -> ReplayGroup:
        """A group for passes like these that are kept elsewhere."""
        return replace(self, kind=kind, device=device, same=same, storage=None, expected=0, targets=[], rows=[])

    def add(self, stored: Sequence[Tensor], target: Any, rows: Tensor, again: Recompute | None = None) -> None:
        """Takes in a batch: its stored tensors, the truth, the rows in the results; `again` is for what is not kept."""
        self.same = self.same or tuple(range(len(stored)))
        kept = sorted(set(self.same))
        if self.storage is None:
            self.shapes = [x.shape[1:] for x in stored]
            self.storage = self._make_storage([self.layouts[i] for i in kept], kept, again)
        self.storage.add([stored[i] for i in kept], rows)
        self.targets.append(to_device(target, torch.device("cpu")))
        self.rows.append(rows)

    def _make_storage(self, layouts: list[SampleLayout], kept: list[int], again: Recompute | None) -> RecordedTensors:
        if self.kind == "mapped":
            return MappedFile(layouts)
        if self.kind == "recomputed":
            assert again is not None

            def remade(rows: Tensor) -> list[Tensor]:
                stored = again(rows)
                return [stored[i] for i in kept]

            return Recomputed(remade, layouts)
        return InMemory(layouts, self.device, half=self.kind == "half", expected=self.expected)

    def finish(self, pin: bool = False) -> None:
        """Ends the recording; page-locked (`pin`) memory is what a GPU takes without a wait."""
        if self.storage is not None:
            self.storage.finish(pin)
        self.rows = [torch.cat(self.rows)]
        self.targets = [
            pytree.tree_map(lambda *xs: torch.cat(xs) if isinstance(xs[0], Tensor) else xs[0], *self.targets)
        ]

    def take(self, samples: slice | Tensor, device: torch.device) -> list[Tensor]:
        """The stored tensors of some samples, on a device."""
        assert self.storage is not None
        kept = sorted(set(self.same))
        taken = self.storage.take(samples, device)
        return [taken[kept.index(i)] for i in self.same]

    def take_last_two(self, samples: slice | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The last two of them: the first site's input and output."""
        assert self.storage is not None
        kept = sorted(set(self.same))
        first = kept.index(min(self.same[-2:]))
        taken = self.storage.take(samples, device, first)
        x, y = (taken[kept.index(i) - first] for i in self.same[-2:])
        return x, y

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
            and self.shapes == [x.shape[1:] for x in stored]
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
