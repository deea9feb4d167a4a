"""Known data as the first repaired layer sees it: what comes before it is run once and kept.

Samples whose passes look alike form a group. Of each tensor that was there when the layer was first called, a group
keeps the values of all samples if they reach the model's output other than through that layer, and one sample's values,
for its shape, if they do not. `recording.record` makes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._model.layers import ParameterSpace
from lightning_nrl._scoring.editable_model import EditableModel, LayerEdit
from lightning_nrl._scoring.replay_group import ReplayGroup
from lightning_nrl._scoring.replay_plan import ReplayPlan
from lightning_nrl._scoring.sample_layout import index_all, to_device
from lightning_nrl._utils.interrupts import poll
from lightning_nrl.errors import ReplayError

__all__ = ["ActivationCache", "Chunk"]

STORAGE_WORDS = {
    "memory": "in memory",
    "half": "in half the precision",
    "mapped": "in a temporary file",
    "recomputed": "computed again each time",
}


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
        """The layers to be repaired."""
        return self.model.space

    @property
    def storage(self) -> str:
        """Where samples are kept, in words; empty if all are in memory as they came."""
        counts: dict[str, int] = {}
        for group in self.groups:
            counts[group.kind] = counts.get(group.kind, 0) + len(group.rows[0])
        if set(counts) <= {"memory"}:
            return ""
        return "activations of " + ", ".join(f"{n:,} samples {STORAGE_WORDS[kind]}" for kind, n in counts.items())

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
        """The same samples in chunks of at most `size`."""
        for start in range(0, len(chunk), size):
            part = slice(start, min(start + size, len(chunk)))
            samples = chunk.samples
            if isinstance(samples, slice):
                samples = slice(samples.start + part.start, samples.start + part.stop)
            else:
                samples = samples[part]
            yield Chunk(chunk.group, samples, chunk.rows[part], index_all(chunk.target, part))

    def activations(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """The first site's input and output, samples first."""
        plan, group = self.plan(chunk), self.groups[chunk.group]
        x, y = group.take_last_two(chunk.samples, self.space.device)
        dim = plan.dims[plan.first.name]
        return x.movedim(dim, 0), y.movedim(dim, 0)

    def plan(self, chunk: Chunk) -> ReplayPlan:
        """How samples that are replayable are resumed."""
        plan = self.groups[chunk.group].plan
        assert plan is not None
        return plan

    def is_replayable(self, chunk: Chunk) -> bool:
        """Whether the chunk is resumed at the first site; else it is run as a whole."""
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
