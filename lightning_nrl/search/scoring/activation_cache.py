"""`ActivationCache`: stored tensors of the known data, from which passes resume at the first
repaired
layer.

Samples whose passes call the same modules with tensors of the same shapes form a group. A group
stores the input and the output of the layer for all its samples. It also stores each earlier tensor
that the model uses again after the layer, such as the shortcut of a residual block.
`recording.record` builds the cache.
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
from lightning_nrl.search.scoring.replay_plan import ReplayPlan
from lightning_nrl.search.scoring.sample_layout import SampleLayout, index_all, to_device
from lightning_nrl.search.scoring.traced_model import EditableModel, Inputs, LayerEdit

Recompute = Callable[
    [Tensor], list[Tensor]
]  # recomputes the stored tensors of given rows of the results
STORED_TENSOR = object()  # placeholder of a stored tensor among the constants of a `ReplayGroup`


@dataclass
class ReplayGroup:
    """Samples whose passes have the same structure, and the tensors from which these passes resume
    (stored tensors).
    """

    plan: ReplayPlan | None  # how to resume the passes; None: the whole model is run
    layouts: list[SampleLayout]  # layout of each stored tensor
    device: torch.device  # device of the stored tensors
    spec: pytree.TreeSpec | None = None  # tree of the model inputs, if the whole model is run
    constants: list[Any] = field(
        default_factory=list
    )  # leaves of that tree, `STORED_TENSOR` for stored tensors
    recomputed: bool = False  # True if stored tensors are recomputed each time
    same: tuple[
        int, ...
    ] = ()  # for each stored tensor, index of the first equal tensor; no other is kept
    expected: int = (
        0  # samples for which memory is allocated at the first batch; 0: every batch allocates
    )
    shapes: list[torch.Size] = field(
        default_factory=list
    )  # of the stored tensors, without the first dimension
    parts: dict[int, list[Tensor]] = field(
        default_factory=dict
    )  # by index of the tensor, parts that `finish` joins
    filled: dict[int, int] = field(
        default_factory=dict
    )  # by index of the tensor, filled entries of the first part
    again: Recompute | None = None
    latest: tuple[int, int, dict[int, Tensor]] = (
        0,
        0,
        {},
    )  # start, stop and tensors of the last recomputation
    batch: int = 0  # size of the largest batch
    targets: list[Any] = field(
        default_factory=list
    )  # one tree of targets per batch, on the CPU; `finish` joins them
    rows: list[Tensor] = field(
        default_factory=list
    )  # rows in the results, per batch; `finish` joins them

    @property
    def nbytes(self) -> int:
        kept = [x for parts in self.parts.values() for x in parts]
        return sum(x.nbytes for x in (*kept, *self.latest[2].values()))

    def empty_like(
        self, device: torch.device, recomputed: bool, same: tuple[int, ...]
    ) -> ReplayGroup:
        return ReplayGroup(
            self.plan, self.layouts, device, self.spec, self.constants, recomputed, same
        )

    def add(
        self, stored: Sequence[Tensor], target: Any, rows: Tensor, again: Recompute | None = None
    ) -> None:
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
            # Costs nothing yet: the system allocates memory pages only when they are written.
            parts.append(x.new_empty((reserved, *x.shape[1:])))
        parts[0][start:stop] = x
        self.filled[i] = stop

    def finish(self, pin: bool = False) -> None:
        """Joins the tensors of all batches. `pin` page-locks the results, for asynchronous copies
        to a GPU.
        """
        for i, parts in self.parts.items():
            if i in self.filled:
                parts[0] = parts[0][: self.filled[i]]
            whole = _concatenated(parts, self.layouts[i].dim)
            parts[:] = [whole.pin_memory() if pin else whole]
        self.rows = [torch.cat(self.rows)]
        self.targets = [
            pytree.tree_map(
                lambda *xs: torch.cat(xs) if isinstance(xs[0], Tensor) else xs[0], *self.targets
            )
        ]

    def take(self, samples: slice | Tensor, device: torch.device, last: int = 0) -> list[Tensor]:
        """Returns each stored tensor, reduced to the rows of `samples`. If `last` is k > 0, returns
        only the last k.
        """
        kept = {i: parts[0] for i, parts in self.parts.items()}
        if self.recomputed:
            kept, samples = self._recompute_batch(samples)
        wanted = self.same[-last:]
        taken = {
            i: self.layouts[i].take(kept[i], samples).to(device, non_blocking=True)
            for i in set(wanted)
        }
        return [taken[i] for i in wanted]

    def _recompute_batch(self, samples: slice | Tensor) -> tuple[dict[int, Tensor], slice | Tensor]:
        """Returns recomputed tensors that contain `samples`, and the positions of `samples` in
        these tensors.
        """
        places = torch.arange(len(self.rows[0]))[
            samples if isinstance(samples, slice) else samples.cpu()
        ]
        low, high = int(places.min()), int(places.max()) + 1
        if high - low > self.batch:
            return self._stored(self.rows[0][places]), slice(None)
        start, stop, kept = self.latest
        if not kept or low < start or high > stop:
            self.latest = (0, 0, {})  # frees the old tensors before new ones are computed
            start, stop = low, min(low + self.batch, len(self.rows[0]))
            self.latest = start, stop, self._stored(self.rows[0][start:stop])
        return self.latest[2], places - start

    def _stored(self, rows: Tensor) -> dict[int, Tensor]:
        assert self.again is not None
        stored = self.again(rows)
        return {i: stored[i] for i in set(self.same)}

    def inputs(self, stored: Sequence[Tensor]) -> Inputs:
        source = iter(stored)
        assert self.spec is not None
        args, kwargs = pytree.tree_unflatten(
            [next(source) if c is STORED_TENSOR else c for c in self.constants], self.spec
        )
        return args, kwargs

    def holds_inputs_like(self, other: ReplayGroup, stored: Sequence[Tensor]) -> bool:
        """True if `stored`, the model inputs that the group `other` stores, fit into this group as
        well.
        """
        return (
            self.plan is None
            and self.spec == other.spec
            and self.shapes == [x.shape[1:] for x in stored]
            and all(_equal(a, b) for a, b in zip(self.constants, other.constants, strict=True))
        )


@dataclass(frozen=True)
class Chunk:
    """Some samples of one group of the cache."""

    group: int
    samples: slice | Tensor  # positions in the group, on the group's device
    rows: Tensor  # n int64 on the CPU, rows of the samples in the results
    target: Any  # targets of the samples, on the model's device

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class ActivationCache:
    """Known data whose passes can be resumed at the first repaired layer."""

    model: EditableModel
    groups: list[ReplayGroup]
    rows: Tensor  # n int64 on the CPU, rows of the samples in the results, in stored order
    fallback_reason: str | None = (
        None  # why some samples need the whole model; None: no sample does
    )

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
        return f"activations: {memory}{again:,} samples computed again whenever needed"

    def chunks(self, size: int | None = None, keep: Tensor | None = None) -> Iterator[Chunk]:
        """Yields chunks of at most `size` samples of one group. The arguments have the same meaning
        as in `Replay`.
        """
        device = self.space.device
        for number, group in enumerate(self.groups):
            rows = group.rows[0]
            chosen = (
                torch.arange(len(rows)) if keep is None else keep.cpu()[rows].nonzero().flatten()
            )
            for part in chosen.split(size or max(1, len(rows))):
                if not len(part):
                    continue
                poll()
                whole = len(part) == int(part[-1] - part[0]) + 1
                # The index is on the device of the samples, so that indexing does not wait for the
                # device.
                samples = slice(int(part[0]), int(part[-1]) + 1) if whole else part.to(group.device)
                yield Chunk(
                    number,
                    samples,
                    rows[part],
                    to_device(index_all(group.targets[0], part), device),
                )

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
        """Resumes the passes of n samples at the first site. Returns `copies * n` rows of logits, n
        for each copy.

        `edit` maps the input and the output of a site (repaired layer), with samples in the first
        dimension, to a new output. At the first site it gets the recorded tensors of n samples,
        which it must not change in place, and returns `copies * n` samples. Later sites have
        `copies * n` samples. Autograd links the logits to new outputs.

        Raises a `ReplayError` if `copies` is above 1 but the samples must run through the whole
        model (see `rerun`).
        """
        group = self.groups[chunk.group]
        stored = group.take(chunk.samples, self.space.device)
        if group.plan is not None:
            return group.plan.resume(self.model, stored, len(chunk), edit, copies)
        if copies != 1:
            raise ReplayError(
                f"`layer`: {self.fallback_reason}, so no pass can be resumed for several candidates at once.",
                "call `ActivationCache.rerun`, which runs the whole model.",
            )
        return self.model.edited_logits(group.inputs(stored), edit)

    def rerun(self, chunk: Chunk, where: Tensor, values: Tensor) -> Tensor:
        """Runs the whole model with candidates `P x K` of the weights at `where`. Returns n rows of
        logits for each.
        """
        group = self.groups[chunk.group]
        inputs = group.inputs(group.take(chunk.samples, self.space.device))
        return torch.cat([self.model.logits(inputs, self.space.changed(where, v)) for v in values])


def split_inputs(inputs: Inputs, n: int, device: torch.device) -> tuple[ReplayGroup, list[Tensor]]:
    """Returns an empty group for passes of the whole model, and the tensors in `inputs` that have
    `n` rows.
    """
    leaves, spec = pytree.tree_flatten((tuple(inputs[0]), dict(inputs[1])))
    stored, constants = [], []
    for x in leaves:
        if isinstance(x, Tensor) and x.ndim > 0 and len(x) == n:
            stored.append(x.clone())
            constants.append(STORED_TENSOR)
        else:
            constants.append(x)
    return ReplayGroup(None, [SampleLayout(0)] * len(stored), device, spec, constants), stored


def _concatenated(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenates and empties `parts`. Each part is freed once it is copied, so that memory is not
    held twice.
    """
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
