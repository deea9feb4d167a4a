"""`ActivationCache`: stored tensors, from which passes resume at the first repaired layer.

Samples whose passes call the same modules with tensors of the same shapes form a group. A group
stores the input and the output of the layer for all its samples. It also stores each earlier tensor
that the model uses again after the layer, such as the shortcut of a residual block.
`recording.record` builds the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_nrl._utils.interrupts import poll
from lightning_nrl.errors import ReplayError
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.search.scoring.replay_plan import ReplayPlan
from lightning_nrl.search.scoring.sample_layout import SampleLayout, Tree, index_all, to_device
from lightning_nrl.search.scoring.traced_model import EditableModel, Inputs, LayerEdit

# Recomputes the stored tensors of given rows of the results.
Recompute = Callable[[Tensor], list[Tensor]]

STORED_TENSOR = object()  # placeholder of a stored tensor among the constants of a `ReplayGroup`


@dataclass
class ReplayGroup:
    """Samples whose passes have the same structure, and the tensors from which they resume."""

    plan: ReplayPlan | None  # how to resume the passes; None: the whole model is run
    layouts: list[SampleLayout]  # layout of each stored tensor
    device: torch.device  # device of the stored tensors
    # Tree of the model inputs, and its leaves with `STORED_TENSOR` for stored tensors, if the whole
    # model is run.
    spec: pytree.TreeSpec | None = None
    constants: list[object] = field(default_factory=list)
    recomputed: bool = False  # True if stored tensors are recomputed each time
    # For each stored tensor, index of the first equal tensor; no other is kept.
    first_equal: tuple[int, ...] = ()
    # Samples for which memory is allocated at the first batch; 0: every batch allocates.
    expected: int = 0
    shapes: list[torch.Size] = field(default_factory=list)  # of the tensors, without dimension 0
    # By index of the tensor: parts that `finish` joins, and the filled entries of the first part.
    parts: dict[int, list[Tensor]] = field(default_factory=dict)
    filled: dict[int, int] = field(default_factory=dict)
    again: Recompute | None = None
    # Start, stop and tensors of the last recomputation.
    latest: tuple[int, int, dict[int, Tensor]] = (0, 0, {})
    batch: int = 0  # size of the largest batch
    # Per batch, targets on the CPU and rows in the results; `finish` joins them.
    targets: list[Tree] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        kept = sum(x.nbytes for parts in self.parts.values() for x in parts)
        return kept + sum(x.nbytes for x in self.latest[2].values())

    def empty_like(
        self, device: torch.device, recomputed: bool, first_equal: tuple[int, ...]
    ) -> ReplayGroup:
        return ReplayGroup(
            self.plan, self.layouts, device, self.spec, self.constants, recomputed, first_equal
        )

    def add(
        self, stored: Sequence[Tensor], target: Tree, rows: Tensor, again: Recompute | None = None
    ) -> None:
        self.first_equal = self.first_equal or tuple(range(len(stored)))
        self.shapes = self.shapes or [x.shape[1:] for x in stored]
        self.again = self.again or again
        if not self.recomputed:
            for i in set(self.first_equal):
                self._keep(i, stored[i].to(self.device))
        self.targets.append(to_device(target, torch.device("cpu")))
        self.rows.append(rows)
        self.batch = max(self.batch, len(rows))

    def _keep(self, i: int, x: Tensor) -> None:
        parts, layout = self.parts.setdefault(i, []), self.layouts[i]
        start = self.filled.get(i, 0)
        stop = start + x.shape[layout.dim]
        reserved = 0
        if self.device.type == "cpu" and layout.dim == 0:
            reserved = self.expected * layout.m
        was_not_reserved = bool(parts) and not start
        if stop > reserved or len(parts) > 1 or was_not_reserved:
            parts.append(x)
            return
        if not parts:
            # Costs nothing yet: the system allocates memory pages only when they are written.
            parts.append(x.new_empty((reserved, *x.shape[1:])))
        parts[0][start:stop] = x
        self.filled[i] = stop

    def finish(self, pin: bool = False) -> None:
        """Joins the tensors of all batches.

        `pin` page-locks the results, for asynchronous copies to a GPU.
        """
        for i, parts in self.parts.items():
            if i in self.filled:
                parts[0] = parts[0][: self.filled[i]]
            joined = _concatenate(parts, self.layouts[i].dim)
            parts[:] = [joined.pin_memory() if pin else joined]
        self.rows = [torch.cat(self.rows)]
        self.targets = [pytree.tree_map(_join_leaves, *self.targets)]

    def take(self, samples: slice | Tensor, device: torch.device, last: int = 0) -> list[Tensor]:
        """Returns the rows `samples` of each stored tensor, or only of the last k = `last` > 0."""
        if self.recomputed:
            kept, samples = self._recompute_batch(samples)
        else:
            kept = {i: parts[0] for i, parts in self.parts.items()}
        wanted = self.first_equal[-last:]
        taken: dict[int, Tensor] = {}
        for i in set(wanted):
            taken[i] = self.layouts[i].take(kept[i], samples).to(device, non_blocking=True)
        return [taken[i] for i in wanted]

    def _recompute_batch(self, samples: slice | Tensor) -> tuple[dict[int, Tensor], slice | Tensor]:
        """Returns recomputed tensors that contain `samples`, and the positions of `samples`."""
        rows = self.rows[0]
        index = samples if isinstance(samples, slice) else samples.cpu()
        positions = torch.arange(len(rows))[index]
        low, high = int(positions.min()), int(positions.max()) + 1
        if high - low > self.batch:
            return self._recompute(rows[positions]), slice(None)
        start, stop, kept = self.latest
        if not kept or low < start or high > stop:
            self.latest = (0, 0, {})  # frees the old tensors before new ones are computed
            start, stop = low, min(low + self.batch, len(rows))
            self.latest = start, stop, self._recompute(rows[start:stop])
        return self.latest[2], positions - start

    def _recompute(self, rows: Tensor) -> dict[int, Tensor]:
        assert self.again is not None
        stored = self.again(rows)
        return {i: stored[i] for i in set(self.first_equal)}

    def inputs(self, stored: Sequence[Tensor]) -> Inputs:
        assert self.spec is not None
        source = iter(stored)
        leaves = [next(source) if x is STORED_TENSOR else x for x in self.constants]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def holds_inputs_like(self, group: ReplayGroup, stored: Sequence[Tensor]) -> bool:
        """True if `stored`, model inputs as `group` stores them, fit into this group as well."""
        if self.plan is not None or self.spec != group.spec:
            return False
        if self.shapes != [x.shape[1:] for x in stored]:
            return False
        pairs = zip(self.constants, group.constants, strict=True)
        return all(_are_equal(a, b) for a, b in pairs)


@dataclass(frozen=True)
class Chunk:
    """Some samples of one group of the cache."""

    group: int
    samples: slice | Tensor  # positions in the group, on the group's device
    rows: Tensor  # n int64 on the CPU, rows of the samples in the results
    target: Tree  # targets of the samples, on the model's device

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class ActivationCache:
    """Known data whose passes can be resumed at the first repaired layer."""

    model: EditableModel
    groups: list[ReplayGroup]
    rows: Tensor  # n int64 on the CPU, rows of the samples in the results, in stored order
    fallback_reason: str | None = None  # why some samples need the whole model; None: none does

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
        """Yields chunks of at most `size` samples of one group, as `Replay` explains."""
        for number, group in enumerate(self.groups):
            rows = group.rows[0]
            positions = torch.arange(len(rows))
            if keep is not None:
                positions = positions[keep.cpu()[rows]]
            for part in positions.split(size or max(1, len(rows))):
                if not len(part):
                    continue
                poll()
                first, last = int(part[0]), int(part[-1])
                samples: slice | Tensor = slice(first, last + 1)
                if len(part) < last + 1 - first:
                    # On the device of the samples, so that indexing does not wait for the device.
                    samples = part.to(group.device)
                target = to_device(index_all(group.targets[0], part), self.space.device)
                yield Chunk(number, samples, rows[part], target)

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
        """Resumes the passes of n samples at the first site.

        Returns `copies * n` rows of logits, n for each copy. `edit` maps the input and the output
        of a site (repaired layer), with samples in the first dimension, to a new output. At the
        first site it gets the recorded tensors of n samples, which it must not change in place, and
        returns `copies * n` samples. Later sites have `copies * n` samples. Autograd links the
        logits to new outputs.

        Raises:
            ReplayError: `copies` is above 1 but the samples must run through the whole model (see
                `rerun`).
        """
        group = self.groups[chunk.group]
        stored = group.take(chunk.samples, self.space.device)
        if group.plan is not None:
            return group.plan.resume(self.model, stored, len(chunk), edit, copies)
        if copies != 1:
            raise ReplayError(
                f"`layer`: {self.fallback_reason}, so no pass can be resumed for several "
                "candidates at once.",
                "call `ActivationCache.rerun`, which runs the whole model.",
            )
        return self.model.edited_logits(group.inputs(stored), edit)

    def rerun(self, chunk: Chunk, where: Tensor, values: Tensor) -> Tensor:
        """Runs the whole model with candidates `P x K` of the weights at `where`.

        Returns n rows of logits for each.
        """
        group = self.groups[chunk.group]
        inputs = group.inputs(group.take(chunk.samples, self.space.device))
        return torch.cat([self.model.logits(inputs, self.space.changed(where, v)) for v in values])


def split_inputs(inputs: Inputs, n: int, device: torch.device) -> tuple[ReplayGroup, list[Tensor]]:
    """Returns a group for passes of the whole model, and the inputs that have `n` rows."""
    leaves, spec = pytree.tree_flatten((tuple(inputs[0]), dict(inputs[1])))
    stored: list[Tensor] = []
    constants: list[object] = []
    for x in leaves:
        if isinstance(x, Tensor) and x.ndim > 0 and len(x) == n:
            stored.append(x.clone())
            constants.append(STORED_TENSOR)
        else:
            constants.append(x)
    return ReplayGroup(None, [SampleLayout(0)] * len(stored), device, spec, constants), stored


def _join_leaves(*leaves: Tree) -> Tree:
    return torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]


def _concatenate(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenates and empties `parts`.

    Each part is freed once it is copied, so that memory is not held twice.
    """
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(x.shape[dim] for x in parts)
    joined, start = parts[0].new_empty(shape), 0
    parts.reverse()
    while parts:
        x = parts.pop()
        joined.narrow(dim, start, x.shape[dim]).copy_(x)
        start += x.shape[dim]
    return joined


def _are_equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b or (type(a) is type(b) and bool(a == b))
