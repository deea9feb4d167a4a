"""`ActivationCache`: stored tensors, from which passes resume at the first repaired layer.

Samples whose passes call the same modules with tensors of the same shapes form a group. A group
stores the input and the output of the layer for all its samples. It also stores each earlier tensor
that the model uses again after the layer, such as the shortcut of a residual block.
`recording.record` builds the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_nrl._utils.interrupts import poll
from lightning_nrl.evaluation.head_features import HeadRecord
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.search.scoring.replay_plan import Plan, ReplayPlan, WholePlan
from lightning_nrl.search.scoring.sample_layout import Tree, index_all, to_device
from lightning_nrl.search.scoring.traced_model import EditableModel, LayerEdit

# Recomputes the stored tensors of given rows of the results.
Recompute = Callable[[Tensor], list[Tensor]]


@dataclass
class ReplayGroup:
    """Samples whose passes have the same structure, and the tensors from which they resume."""

    plan: Plan
    tensors: list[Tensor]  # stored tensors; none if they are recomputed
    target: Tree  # on the CPU
    rows: Tensor  # n int64 on the CPU, rows of the samples in the results
    again: Recompute | None = None  # recomputes the tensors each time they are needed
    # Rows and tensors of the last recomputation.
    latest: tuple[Tensor, list[Tensor]] | None = None

    @property
    def device(self) -> torch.device:
        if self.tensors:
            return self.tensors[0].device
        return torch.device("cpu")

    @property
    def nbytes(self) -> int:
        tensors = list(self.tensors)
        if self.latest is not None:
            tensors += self.latest[1]
        return sum(x.nbytes for x in tensors)

    def take(self, samples: slice | Tensor, device: torch.device, last: int = 0) -> list[Tensor]:
        """Returns the rows `samples` of each stored tensor, or only of the last k = `last` > 0."""
        tensors = self.tensors
        if self.again is not None:
            tensors = self._recompute(self.again, samples)
            samples = slice(None)
        wanted = zip(tensors[-last:], self.plan.layouts[-last:], strict=True)
        return [layout.take(x, samples).to(device, non_blocking=True) for x, layout in wanted]

    def _recompute(self, again: Recompute, samples: slice | Tensor) -> list[Tensor]:
        rows = self.rows[samples if isinstance(samples, slice) else samples.cpu()]
        if self.latest is None or not torch.equal(rows, self.latest[0]):
            self.latest = None  # frees the old tensors before new ones are computed
            self.latest = rows, again(rows)
        return self.latest[1]


@dataclass(frozen=True)
class Chunk:
    """Some samples of one group of the cache."""

    group: ReplayGroup
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
    head: HeadRecord | None = None  # from which the cache is made, see `head_cache`

    def with_head(self, record: HeadRecord) -> ActivationCache:
        """Returns a cache of the same last layer under other weights, or on other data."""
        rows, _, *tensors, targets = record
        group = replace(self.groups[0], tensors=tensors, rows=rows)
        if rows is not self.rows:
            group.target = joined_targets(targets)
        return replace(self, groups=[group], rows=rows, head=record)

    def only(self, keep: Tensor) -> ActivationCache:
        """Returns a cache of the stored samples in `keep`, `N` bool by row of the results."""
        if keep[self.rows].all():
            return self
        groups = []
        for group in self.groups:
            at = keep[group.rows].nonzero().flatten()
            tensors = group.take(at.to(group.device), group.device)
            target = index_all(group.target, at)
            groups.append(ReplayGroup(group.plan, tensors, target, group.rows[at]))
        rows = torch.cat([group.rows for group in groups])
        return replace(self, groups=groups, rows=rows, head=None)

    @property
    def space(self) -> ParameterSpace:
        return self.model.space

    @property
    def storage(self) -> str:
        again = sum(len(group.rows) for group in self.groups if group.again is not None)
        if not again:
            return ""
        kept = len(self.rows) - again
        memory = f"{kept:,} samples in memory, " if kept else ""
        return f"activations: {memory}{again:,} samples computed again whenever needed"

    def chunks(
        self, size: int | list[int] | None = None, keep: Tensor | None = None
    ) -> Iterator[Chunk]:
        """Yields chunks of samples of one group, of at most `size` or with these sizes in turn."""
        for group in self.groups:
            rows = group.rows
            positions = torch.arange(len(rows))
            if keep is not None:
                positions = positions[keep.cpu()[rows]]
            for part in positions.split(size or max(1, len(rows))):
                if not len(part):
                    continue
                poll()
                first, last = int(part[0]), int(part[-1])
                samples = slice(first, last + 1)
                if len(part) < last + 1 - first:
                    # On the device of the samples, so that indexing does not wait for the device.
                    samples = part.to(group.device)
                target = to_device(index_all(group.target, part), self.space.device)
                yield Chunk(group, samples, rows[part], target)

    def split(self, chunk: Chunk, size: int) -> Iterator[Chunk]:
        for start in range(0, len(chunk), size):
            part, samples = slice(start, min(start + size, len(chunk))), chunk.samples
            if isinstance(samples, slice):
                samples = slice(samples.start + part.start, samples.start + part.stop)
            else:
                samples = samples[part]
            yield Chunk(chunk.group, samples, chunk.rows[part], index_all(chunk.target, part))

    def activations(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        plan = self.plan(chunk)
        x, y = chunk.group.take(chunk.samples, self.space.device, last=2)
        dim = plan.dims[plan.first.name]
        return x.movedim(dim, 0), y.movedim(dim, 0)

    def plan(self, chunk: Chunk) -> ReplayPlan:
        assert isinstance(chunk.group.plan, ReplayPlan)
        return chunk.group.plan

    def is_replayable(self, chunk: Chunk) -> bool:
        return isinstance(chunk.group.plan, ReplayPlan)

    def replay(self, chunk: Chunk, edit: LayerEdit, copies: int = 1) -> Tensor:
        """Resumes the passes of n samples at the first site, or runs the whole model.

        Returns `copies * n` rows of logits, n for each copy. `edit` maps the input and the output
        of a site (repaired layer), with samples in the first dimension, to a new output. At the
        first site it gets the recorded tensors of n samples, which it must not change in place, and
        returns `copies * n` samples. Later sites have `copies * n` samples. Autograd links the
        logits to new outputs. `copies` must be 1 if the chunk is not replayable (see `rerun`).
        """
        stored = chunk.group.take(chunk.samples, self.space.device)
        return chunk.group.plan.resume(self.model, stored, len(chunk), edit, copies)

    def rerun(self, chunk: Chunk, parameters: Mapping[str, Tensor]) -> Tensor:
        """Runs the whole model on a chunk that is not replayable, with other parameters."""
        assert isinstance(chunk.group.plan, WholePlan)
        stored = chunk.group.take(chunk.samples, self.space.device)
        return self.model.logits(
            chunk.group.plan.inputs(self.model, stored, len(chunk)), parameters
        )


def joined_targets(targets: Sequence[Tree]) -> Tree:
    """Joins the targets of batches on the CPU."""

    def join(*leaves: Tree) -> Tree:
        if isinstance(leaves[0], Tensor):
            return torch.cat(leaves)
        return leaves[0]

    return pytree.tree_map(join, *to_device(list(targets), torch.device("cpu")))
