"""Known data as the first repaired layer sees it: what comes before it is run once and kept.

Samples whose passes look alike form a group. Of each tensor that was there when the layer was first called, a group
keeps the values of all samples if they reach the model's output other than through that layer, and one sample's values,
for its shape, if they do not. `recording.record` makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_nrl._utils.interrupts import poll
from lightning_nrl.errors import ReplayError
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.search._scoring.replay_plan import ReplayPlan
from lightning_nrl.search._scoring.sample_layout import SampleLayout, index_all, to_device
from lightning_nrl.search._scoring.traced_model import EditableModel, Inputs, LayerEdit

Recompute = Callable[[Tensor], list[Tensor]]
"""Makes the stored tensors of samples again, by their rows in the results."""


class _StoredTensor:
    """Stands where a stored tensor goes."""


STORED_TENSOR = _StoredTensor()


@dataclass
class ReplayGroup:
    """Passes that look alike. Of equal stored tensors one is kept, in memory or of one batch, the rest made again."""

    plan: ReplayPlan | None  # how they are resumed; None: they are run as a whole
    layouts: list[SampleLayout]  # where the samples are in each stored tensor
    device: torch.device  # where the stored tensors are kept
    spec: pytree.TreeSpec | None = None  # the tree of model inputs, if they are run as a whole
    constants: list[Any] = field(default_factory=list)  # what stands in it where no stored tensor does
    recomputed: bool = False  # whether the stored tensors are made again each time
    same: tuple[int, ...] = ()  # for each stored tensor the first one that is equal to it, itself where none is
    expected: int = 0  # samples for which memory is taken from the first batch on; what comes beyond them is joined
    shapes: list[torch.Size] = field(default_factory=list)  # of the stored tensors without their first dimension
    parts: dict[int, list[Tensor]] = field(default_factory=dict)  # of each kept one by batch; one is left at the end
    filled: dict[int, int] = field(default_factory=dict)  # entries of each first part that are taken
    again: Recompute | None = None
    latest: tuple[int, int, dict[int, Tensor]] = (0, 0, {})  # first and last place of what was made last, and what
    batch: int = 0  # samples of the largest batch
    targets: list[Any] = field(default_factory=list)  # trees of truths by batch, on the CPU; one is left at the end
    rows: list[Tensor] = field(default_factory=list)  # in the results, likewise

    @property
    def nbytes(self) -> int:
        kept = [x for parts in self.parts.values() for x in parts]
        return sum(x.nbytes for x in (*kept, *self.latest[2].values()))

    def empty_like(self, device: torch.device, recomputed: bool, same: tuple[int, ...]) -> ReplayGroup:
        return ReplayGroup(self.plan, self.layouts, device, self.spec, self.constants, recomputed, same)

    def add(self, stored: Sequence[Tensor], target: Any, rows: Tensor, again: Recompute | None = None) -> None:
        """Takes in a batch: its stored tensors, the truth, the rows in the results; `again` is for what is not kept."""
        self.same = self.same or tuple(range(len(stored)))
        self.shapes = self.shapes or [x.shape[1:] for x in stored]
        self.again = self.again or again
        if not self.recomputed:
            for i in set(self.same):
                self._keep(i, stored[i].to(self.device))
        self.targets.append(to_device(target, torch.device("cpu")))
        self.rows.append(rows)
        self.batch = max(self.batch, len(rows))

    def _keep(self, i: int, x: Tensor) -> None:
        parts, layout, start = self.parts.setdefault(i, []), self.layouts[i], self.filled.get(i, 0)
        reserved = self.expected * layout.m if self.device.type == "cpu" and layout.dim == 0 else 0
        stop = start + x.shape[layout.dim]
        if stop > reserved or len(parts) > 1 or (parts and not start):
            parts.append(x)
            return
        if not parts:
            # Its pages are taken as they fill.
            parts.append(x.new_empty((reserved, *x.shape[1:])))
        parts[0][start:stop] = x
        self.filled[i] = stop

    def finish(self, pin: bool = False) -> None:
        """Ends the recording; page-locked (`pin`) memory is what a GPU takes without a wait."""
        for i, parts in self.parts.items():
            if i in self.filled:
                parts[0] = parts[0][: self.filled[i]]
            whole = _joined(parts, self.layouts[i].dim)
            parts[:] = [whole.pin_memory() if pin else whole]
        self.rows = [torch.cat(self.rows)]
        self.targets = [
            pytree.tree_map(lambda *xs: torch.cat(xs) if isinstance(xs[0], Tensor) else xs[0], *self.targets)
        ]

    def take(self, samples: slice | Tensor, device: torch.device, last: int = 0) -> list[Tensor]:
        """Returns some samples of all stored tensors, or of the last few; views where nothing has to be moved."""
        kept = {i: parts[0] for i, parts in self.parts.items()}
        if self.recomputed:
            kept, samples = self._made_again(samples)
        wanted = self.same[-last:]
        taken = {i: self.layouts[i].take(kept[i], samples).to(device, non_blocking=True) for i in set(wanted)}
        return [taken[i] for i in wanted]

    def _made_again(self, samples: slice | Tensor) -> tuple[dict[int, Tensor], slice | Tensor]:
        """Returns tensors and the samples' places in them; with those after them, if together they are one batch."""
        places = torch.arange(len(self.rows[0]))[samples if isinstance(samples, slice) else samples.cpu()]
        low, high = int(places.min()), int(places.max()) + 1
        if high - low > self.batch:
            return self._stored(self.rows[0][places]), slice(None)
        start, stop, kept = self.latest
        if not kept or low < start or high > stop:
            self.latest = (0, 0, {})  # so that memory is held once
            start, stop = low, min(low + self.batch, len(self.rows[0]))
            self.latest = start, stop, self._stored(self.rows[0][start:stop])
        return self.latest[2], places - start

    def _stored(self, rows: Tensor) -> dict[int, Tensor]:
        assert self.again is not None
        stored = self.again(rows)
        return {i: stored[i] for i in set(self.same)}

    def inputs(self, stored: Sequence[Tensor]) -> Inputs:
        """The model inputs, for samples that are run as a whole."""
        source = iter(stored)
        assert self.spec is not None
        args, kwargs = pytree.tree_unflatten(
            [next(source) if c is STORED_TENSOR else c for c in self.constants], self.spec
        )
        return args, kwargs

    def holds_inputs_like(self, other: ReplayGroup, stored: Sequence[Tensor]) -> bool:
        """True if samples that are run whole, with `stored` kept, belong to this group too."""
        return (
            self.plan is None
            and self.spec == other.spec
            and self.shapes == [x.shape[1:] for x in stored]
            and all(_equal(a, b) for a, b in zip(self.constants, other.constants, strict=True))
        )


@dataclass(frozen=True)
class Chunk:
    """Some samples of one group."""

    group: int  # which group
    samples: slice | Tensor  # their places in it, on the device where it is kept
    rows: Tensor  # n int64 on the CPU, in the results
    target: Any  # their truth, on the model's device

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class ActivationCache:
    """Known data, ready to be run again from the first repaired layer on."""

    model: EditableModel  # with its repaired layers, the task and the context of its passes
    groups: list[ReplayGroup]
    rows: Tensor  # n int64 on the CPU, rows of the samples in the results, in the order they are kept
    fallback_reason: str | None = None  # why some samples are run through the whole model; None if none is

    @property
    def space(self) -> ParameterSpace:
        return self.model.space

    @property
    def storage(self) -> str:
        again = sum(len(group.rows[0]) for group in self.groups if group.recomputed)
        if not again:
            return ""
        kept = len(self.rows) - again
        memory = f"{kept:,} samples in memory, " if kept else ""
        return f"activations of {memory}{again:,} samples computed again each time"

    def chunks(self, size: int | None = None, keep: Tensor | None = None) -> Iterator[Chunk]:
        """The recorded samples that `keep`, `N` bool by row of the results, marks, group by group, `size` at most."""
        device = self.space.device
        for number, group in enumerate(self.groups):
            rows = group.rows[0]
            chosen = torch.arange(len(rows)) if keep is None else keep.cpu()[rows].nonzero().flatten()
            for part in chosen.split(size or max(1, len(rows))):
                if not len(part):
                    continue
                poll()
                whole = len(part) == int(part[-1] - part[0]) + 1
                # Beside the samples themselves, so that taking them makes no device wait for the host.
                samples = slice(int(part[0]), int(part[-1]) + 1) if whole else part.to(group.device)
                yield Chunk(number, samples, rows[part], to_device(index_all(group.targets[0], part), device))

    def split(self, chunk: Chunk, size: int) -> Iterator[Chunk]:
        for start in range(0, len(chunk), size):
            part, samples = slice(start, min(start + size, len(chunk))), chunk.samples
            if isinstance(samples, slice):
                samples = slice(samples.start + part.start, samples.start + part.stop)
            else:
                samples = samples[part]
            yield Chunk(chunk.group, samples, chunk.rows[part], index_all(chunk.target, part))

    def activations(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        plan, group = self.plan(chunk), self.groups[chunk.group]
        x, y = group.take(chunk.samples, self.space.device, last=2)
        dim = plan.dims[plan.first.name]
        return x.movedim(dim, 0), y.movedim(dim, 0)

    def plan(self, chunk: Chunk) -> ReplayPlan:
        plan = self.groups[chunk.group].plan
        assert plan is not None
        return plan

    def is_replayable(self, chunk: Chunk) -> bool:
        return self.groups[chunk.group].plan is not None

    def replay(self, chunk: Chunk, edit: LayerEdit, copies: int = 1) -> Tensor:
        """Runs what comes after the first site: logits of `copies * n` samples, copy by copy.

        `edit` gives the output of each site to go on with, samples in the first dimension. At the site that is called
        first, input and output are the recorded ones of `n` samples and must not be changed in place; what it returns
        has `copies * n`, as everything has at later sites. Differentiable in that if gradients are on. Several copies
        of samples that can only be run as a whole are a `ReplayError`: `rerun` is for those.
        """
        group = self.groups[chunk.group]
        stored = group.take(chunk.samples, self.space.device)
        if group.plan is not None:
            return group.plan.resume(self.model, stored, len(chunk), edit, copies)
        if copies != 1:
            raise ReplayError(
                f"`layer`: {self.fallback_reason}, so copies of samples cannot be run at once.",
                "give whole parameters to `rerun`.",
            )
        return self.model.edited_logits(group.inputs(stored), edit)

    def rerun(self, chunk: Chunk, where: Tensor, values: Tensor) -> Tensor:
        """The whole model's logits of `P * n` samples, candidate by candidate, of values `P x K` at flat positions."""
        group = self.groups[chunk.group]
        inputs = group.inputs(group.take(chunk.samples, self.space.device))
        return torch.cat([self.model.logits(inputs, self.space.changed(where, v)) for v in values])


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


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """All parts in one tensor, each given up as soon as it is copied; in main memory pages are taken as they fill."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(x.shape[dim] for x in parts)
    whole, start = parts[0].new_empty(shape), 0
    parts.reverse()
    while parts:
        x = parts.pop()
        whole.narrow(dim, start, x.shape[dim]).copy_(x)
        start += x.shape[dim]
    return whole


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b or (type(a) is type(b) and bool(a == b))
