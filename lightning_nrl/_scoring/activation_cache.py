"""Known data as the first repaired layer sees it: what comes before it is run once and remembered.

Samples whose passes look alike (same modules, same shapes but for the number of samples) form a group. Of each tensor
that was there when the layer was first called, a group keeps the values of all samples if they reach the model's output
other than through that layer, and one sample's values, for its shape, if they do not.

Nothing is taken on trust. The first pass of each group is replayed under changed weights and compared with the whole
model, every later one under the original weights. What cannot be replayed is kept as model inputs and run as a whole:
slower, as exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_nrl._model.layers import LayerRef, ParameterSpace
from lightning_nrl._scoring.replay import Inputs, LayerEdit, Plan, Subject
from lightning_nrl._scoring.replay_plan import make_plan, same_values
from lightning_nrl._scoring.sample_layout import Layout, joined, select, select_all, to_device
from lightning_nrl._utils.precision import Context
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import PerformanceWarning, ReplayError, explain
from lightning_nrl.tasks import Task

__all__ = ["ActivationCache", "Chunk", "record"]


@dataclass(frozen=True)
class Chunk:
    """Some samples of one group.

    Attributes:
        group: which group.
        samples: their places in it, on the device where it is kept.
        rows: their rows in the evidence, `n` int64 on the CPU.
        target: their truth, on the model's device.
    """

    group: int
    samples: slice | Tensor
    rows: Tensor
    target: Any

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class _Group:
    """Passes that look alike.

    Attributes:
        plan: how they are resumed; None if they are run as a whole.
        layouts: where the samples are in each stored tensor.
        spec: the shape of the tree of model inputs, if they are run as a whole.
        constants: what stands in that tree where no stored tensor does.
        parts: for each stored tensor the batches that make it up; one when recording is over.
        targets: trees of truths, a batch each; one when recording is over.
        rows: rows in the evidence, a batch each; one when recording is over.
    """

    plan: Plan | None
    layouts: list[Layout]
    spec: pytree.TreeSpec | None = None
    constants: list[Any] = field(default_factory=list)
    parts: list[list[Tensor]] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def add(self, stored: list[Tensor], target: Any, rows: Tensor) -> None:
        self.parts = self.parts or [[] for _ in stored]
        for parts, x in zip(self.parts, stored, strict=True):
            parts.append(x)
        self.targets.append(target)
        self.rows.append(rows)

    def close(self) -> None:
        for parts, layout in zip(self.parts, self.layouts, strict=True):
            parts.append(joined(parts, layout.dim))
        self.rows = [torch.cat(self.rows)]
        self.targets = [pytree.tree_map(lambda *xs: _joined_targets(xs), *self.targets)]

    def move(self, device: torch.device) -> None:
        self.parts = [[x.to(device) for x in parts] for parts in self.parts]

    @property
    def device(self) -> torch.device:
        """Where its tensors are kept."""
        return next((x.device for parts in self.parts for x in parts), torch.device("cpu"))

    def take(self, samples: slice | Tensor, device: torch.device) -> list[Tensor]:
        return [
            layout.take(parts[0], samples).to(device) for parts, layout in zip(self.parts, self.layouts, strict=True)
        ]

    def inputs(self, stored: list[Tensor]) -> Inputs:
        source = iter(stored)
        assert self.spec is not None
        return pytree.tree_unflatten([next(source) if c is _STORED else c for c in self.constants], self.spec)


@dataclass
class ActivationCache:
    """Known data, ready to be run again from the first repaired layer on.

    Attributes:
        subject: the model, its repaired layers, the task and the context of its passes.
        rows: rows of the recorded samples in the evidence, `n` int64 on the CPU, in the order they are kept.
        fallback_reason: why some samples are run through the whole model; None if none is.
    """

    subject: Subject
    groups: list[_Group]
    rows: Tensor
    fallback_reason: str | None = None

    @property
    def space(self) -> ParameterSpace:
        """The layers to be repaired."""
        return self.subject.space

    def chunks(self, size: int | None = None, keep: Tensor | None = None) -> Iterator[Chunk]:
        """The recorded samples, group by group.

        Args:
            size: at most so many samples a chunk; None gives a group at once.
            keep: `N` bool by row of the evidence, which samples are wanted; None for all.
        """
        device = self.subject.space.device
        for number, group in enumerate(self.groups):
            rows = group.rows[0]
            chosen = torch.arange(len(rows)) if keep is None else keep.cpu()[rows].nonzero().flatten()
            for part in chosen.split(size or max(1, len(rows))):
                if not len(part):
                    continue
                whole = len(part) == int(part[-1] - part[0]) + 1
                # Beside the samples themselves, so that taking them makes no device wait for the host.
                samples = slice(int(part[0]), int(part[-1]) + 1) if whole else part.to(group.device)
                yield Chunk(number, samples, rows[part], to_device(select_all(group.targets[0], part), device))

    def split(self, chunk: Chunk, size: int) -> Iterator[Chunk]:
        """The same samples in chunks of at most `size`."""
        for start in range(0, len(chunk), size):
            part = slice(start, min(start + size, len(chunk)))
            samples = chunk.samples
            if isinstance(samples, slice):
                samples = slice(samples.start + part.start, samples.start + part.stop)
            else:
                samples = samples[part]
            yield Chunk(chunk.group, samples, chunk.rows[part], select_all(chunk.target, part))

    def first(self, chunk: Chunk) -> LayerRef:
        """The site that the model calls first, for samples that are replayable."""
        return self._plan(chunk).first

    def direct(self, chunk: Chunk) -> bool:
        """Whether the first site's output is what the model returns."""
        return self._plan(chunk).direct

    def site(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """The first site's input and output, samples first."""
        plan, device = self._plan(chunk), self.subject.space.device
        group = self.groups[chunk.group]
        x, y = (
            layout.take(parts[0], chunk.samples).to(device)
            for parts, layout in zip(group.parts[-2:], group.layouts[-2:], strict=True)
        )
        dim = plan.dims[plan.first.name]
        return x.movedim(dim, 0), y.movedim(dim, 0)

    def _plan(self, chunk: Chunk) -> Plan:
        plan = self.groups[chunk.group].plan
        assert plan is not None
        return plan

    def replayable(self, chunk: Chunk) -> bool:
        """Whether the chunk is resumed at the first site; else it is run as a whole."""
        return self.groups[chunk.group].plan is not None

    def replay(self, chunk: Chunk, edit: LayerEdit, copies: int = 1) -> Tensor:
        """Runs what comes after the first site.

        Args:
            chunk: `n` samples.
            edit: `edit(site, input, output)` is called at every site and gives the output to go on with, samples in the
                first dimension. At the site that the model calls first, input and output are the remembered ones of `n`
                samples and must not be changed in place; what it returns has `copies * n`, copy by copy. At later sites
                everything has `copies * n`.
            copies: how often each sample is run.

        Returns:
            Logits of `copies * n` samples, copy by copy. Differentiable in what `edit` returns if gradients are on.

        Raises:
            ReplayError: several copies of samples that can only be run as a whole; use `rerun` for those.
        """
        group = self.groups[chunk.group]
        stored = group.take(chunk.samples, self.subject.space.device)
        if group.plan is not None:
            return group.plan.resume(self.subject, stored, len(chunk), edit, copies)
        if copies != 1:
            raise ReplayError(
                explain(
                    f"`layer`: {self.fallback_reason}, so copies of samples cannot be run at once.",
                    "give whole parameters to `rerun`.",
                )
            )
        return self.subject.edited(group.inputs(stored), edit)

    def rerun(self, chunk: Chunk, where: Tensor, values: Tensor) -> Tensor:
        """Runs the whole model on samples that are not replayable, once a candidate.

        Args:
            chunk: `n` samples.
            where: `K` int64, flat positions of the changed weights.
            values: `P x K`.

        Returns:
            Logits of `P * n` samples, candidate by candidate.
        """
        group = self.groups[chunk.group]
        inputs = group.inputs(group.take(chunk.samples, self.subject.space.device))
        return torch.cat([self.subject.whole(inputs, self.subject.space.changed(where, v)) for v in values])


@torch.no_grad()
def record(
    model: nn.Module,
    batches: Iterable[tuple[Batch, Tensor]],
    space: ParameterSpace,
    task: Task,
    keep: Tensor,
    *,
    context: Context = nullcontext,
    budget: int | None = None,
) -> ActivationCache:
    """Runs the model once over known data and keeps what a repair of the given layers needs of it.

    Args:
        model: the model in evaluation mode.
        batches: this rank's batches, each with its samples' rows in the evidence, `n` int64 on the CPU.
        space: the repaired layers.
        task: finds the logits in what the model returns.
        keep: `N` bool by row of the evidence, which samples are wanted.
        context: entered around every forward pass, such as autocast.
        budget: bytes that may be held on the model's device; beyond them everything is held on the CPU. By default half
            of what is free on a GPU, and no limit elsewhere.

    Returns:
        The recording. If samples have to be run as a whole a warning says why.

    Raises:
        ReplayError: a layer that is never called.
    """
    subject = Subject(model, space, task, context)
    recording = ActivationCache(subject, [], torch.zeros(0, dtype=torch.int64))
    budget = _default_budget(space.device) if budget is None else budget
    held, storage = 0, space.device
    for batch, rows in batches:
        index = keep.cpu()[rows].nonzero().flatten()
        if not len(index):
            continue
        inputs = (batch.args, batch.kwargs)
        inputs, target = (
            (inputs, batch.target)
            if len(index) == len(rows)
            else (select(inputs, index, len(rows)), select(batch.target, index, len(rows)))
        )
        group, stored = _sort_in(recording, inputs, len(index))
        held += sum(x.nbytes for x in stored)
        if storage.type != "cpu" and held > budget:
            storage = torch.device("cpu")
            for other in recording.groups:
                other.move(storage)
        group.add([x.to(storage) for x in stored], to_device(target, torch.device("cpu")), rows[index])
    for group in recording.groups:
        group.close()
    recording.rows = torch.cat([recording.rows, *(group.rows[0] for group in recording.groups)])
    if recording.fallback_reason is not None:
        warnings.warn(
            explain(
                f"`layer`: {recording.fallback_reason}, so every candidate is run through the whole model.",
                "the repair is as exact, only slower; another layer may be faster.",
            ),
            category=PerformanceWarning,
            stacklevel=2,
        )
    return recording


def _sort_in(recording: ActivationCache, inputs: Inputs, n: int) -> tuple[_Group, list[Tensor]]:
    """Runs a batch; gives the group it belongs to, a new one if need be, and what that stores of it."""
    subject = recording.subject
    plans = [group.plan for group in recording.groups if group.plan is not None]
    live = {name for plan in plans for name in plan.live_calls}
    moment, logits = subject.watch(inputs, live.__contains__)
    for group in recording.groups:
        stored = None if group.plan is None else group.plan.accepts(moment, inputs, n)
        if stored is None:
            continue
        again = group.plan.resume(subject, stored, n, lambda site, x, y: y)  # type: ignore[union-attr]
        if same_values(again, logits, stored[-1].dtype):
            return group, stored
        return _whole_group(recording, inputs, n, "replaying some samples gives other outputs than the whole model")
    if plans and all(tuple(moment.calls) != plan.calls for plan in plans):
        return _whole_group(recording, inputs, n, "the order in which modules are called depends on the data")
    plan = make_plan(subject, inputs, n)
    if isinstance(plan, str):
        return _whole_group(recording, inputs, n, plan)
    moment, logits = subject.watch(inputs, plan.live_calls.__contains__)
    stored = plan.accepts(moment, inputs, n)
    if stored is None or not same_values(
        plan.resume(subject, stored, n, lambda site, x, y: y), logits, stored[-1].dtype
    ):
        return _whole_group(recording, inputs, n, "replaying some samples gives other outputs than the whole model")
    recording.groups.append(_Group(plan, plan.layouts()))
    return recording.groups[-1], stored


class _Stored:
    """Stands where a stored tensor goes."""


_STORED = _Stored()


def _whole_group(recording: ActivationCache, inputs: Inputs, n: int, reason: str) -> tuple[_Group, list[Tensor]]:
    recording.fallback_reason = recording.fallback_reason or reason
    leaves, spec = pytree.tree_flatten((tuple(inputs[0]), dict(inputs[1])))
    counts = [isinstance(x, Tensor) and x.ndim > 0 and len(x) == n for x in leaves]
    stored = [x.clone() for x, yes in zip(leaves, counts, strict=True) if yes]
    constants = [_STORED if yes else x for x, yes in zip(leaves, counts, strict=True)]
    for group in recording.groups:
        alike = group.plan is None and group.spec == spec and len(group.parts) == len(stored)
        alike = alike and all(a[0].shape[1:] == b.shape[1:] for a, b in zip(group.parts, stored, strict=True))
        if alike and all(_same(a, b) for a, b in zip(group.constants, constants, strict=True)):
            return group, stored
    recording.groups.append(_Group(None, [Layout(0)] * len(stored), spec, constants))
    return recording.groups[-1], stored


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b or (type(a) is type(b) and bool(a == b))


def _joined_targets(xs: tuple[Any, ...]) -> Any:
    return torch.cat(xs) if isinstance(xs[0], Tensor) else xs[0]


def _default_budget(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 62
