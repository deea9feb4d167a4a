"""Runs a model once over known data and stores the tensors from which its passes resume.

Passes with the same calls and shapes form a group. Each resumed pass is compared with the whole
model: under changed weights for the first pass of a group, under the original weights for later
passes. Samples whose pass cannot be resumed are stored as model inputs and run through the whole
model. Tensors that do not fit in memory are recomputed each time they are needed. Which tensors fit
depends only on the sizes of tensors and on the memory budgets.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.interrupts import poll
from lightning_nrl.data.batch import Batch, is_sliceable
from lightning_nrl.errors import (
    ConfigurationError,
    InseparableBatchError,
    PerformanceWarning,
    ReplayError,
)
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.head_features import HeadRecord
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.search.scoring.activation_cache import (
    ActivationCache,
    Recompute,
    ReplayGroup,
    joined_targets,
)
from lightning_nrl.search.scoring.memory import free_memory
from lightning_nrl.search.scoring.replay_plan import (
    OTHER_ORDER,
    NotReplayableError,
    Plan,
    ReplayPlan,
    WholePlan,
    find_replay_plan,
    flatten_last_layer,
    perturbed,
    same_values,
)
from lightning_nrl.search.scoring.sample_layout import index_batch, to_device
from lightning_nrl.search.scoring.sparse_delta import output_under
from lightning_nrl.search.scoring.traced_model import EditableModel, Inputs, inputs_of

OTHER_OUTPUTS = "for some samples a resumed pass gives other outputs than the whole model"

Draw = Callable[[Tensor], Iterable[tuple[Batch, Tensor]]]
"""Reads samples again, given their rows in the results in ascending order.

Yields batches and their samples' rows.
"""


@torch.no_grad()
def record(
    evaluator: Evaluator,
    batches: Iterable[tuple[Batch, Tensor]],
    space: ParameterSpace,
    keep: Tensor,
    *,
    budget: int | None = None,
    draw: Draw | None = None,
) -> ActivationCache:
    """Records the known data for a repair of `space`.

    Warns if some samples must run through the whole model. On a GPU, tensors beyond `budget` are
    stored in main memory, but at most in half of its free part.

    Args:
        evaluator: the model and its task.
        batches: this rank's batches and their samples' rows in the results, int64.
        space: the repaired layers.
        keep: `N` bool, the samples to store; entry i belongs to row i of the results.
        budget: bytes on the model's device; None: half of the free memory.
        draw: reads samples again whose tensors do not fit in memory; None: all tensors are stored.

    Raises:
        ReplayError: `space` has no layer, or the model never calls one of its layers.
    """
    if not space.sites:
        raise ReplayError(space.obstacle)
    recorder = PassRecorder(EditableModel(evaluator, space))
    growing: list[_GrowingGroup] = []
    memory = {place: free_memory(place) // 2 for place in (space.device, torch.device("cpu"))}
    if budget is not None:
        memory[space.device] = budget
    for batch, rows in batches:
        poll()
        index = keep.cpu()[rows].nonzero().flatten()
        if not len(index):
            continue
        inputs, n = inputs_of(batch), len(rows)
        again = None
        if recorder.can_cut(inputs, n):
            plan, stored = recorder.record(index_batch(inputs, index, n), len(index))
            # Other inputs might be collated differently in the batches that are read again.
            if draw is not None and is_sliceable(inputs, n):
                again = partial(_recompute, recorder.model, plan, draw)
        else:
            plan, stored = recorder.record_last_layer(inputs, n)
            stored = [x.index_select(0, index.to(x.device)) for x in stored]
        group = _group_with_room(growing, plan, sum(x.nbytes for x in stored), memory, again)
        group.add(stored, index_batch(batch.target, index, n), rows[index])
    groups = [group.joined(pin=space.device.type == "cuda") for group in growing]
    if recorder.fallback_reason is not None:
        reason = recorder.fallback_reason
        warnings.warn(
            PerformanceWarning(
                f"`layer`: {reason}, so every candidate is run through the whole model.",
                "the result is the same, only slower; another layer may be faster.",
            ),
            stacklevel=2,
        )
    stored_rows = [torch.zeros(0, dtype=torch.int64), *(group.rows for group in groups)]
    return ActivationCache(recorder.model, groups, torch.cat(stored_rows), recorder.fallback_reason)


@torch.no_grad()
def head_cache(
    evaluator: Evaluator, space: ParameterSpace, record: HeadRecord, few: Batch
) -> ActivationCache | None:
    """Makes a cache of the last layer from its record in a pass.

    Returns None unless the layer is the only one of `space`, and maps its inputs to the logits
    under other weights, too, as the pass of a `few` samples shows.
    """
    model = EditableModel(evaluator, space)
    try:
        plan, _ = PassRecorder(model).record_last_layer(inputs_of(few), len(few))
    except (ReplayError, ConfigurationError):
        return None
    rows = record.rows[:0]
    return ActivationCache(model, [ReplayGroup(plan, [], None, rows)], rows).with_head(record)


@dataclass
class _GrowingGroup:
    """A group while its samples are recorded, with a part of each batch."""

    plan: Plan
    device: torch.device  # of the stored tensors
    again: Recompute | None
    tensors: list[list[Tensor]] = field(default_factory=list)  # the parts of each stored tensor
    targets: list[object] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def add(self, stored: Sequence[Tensor], target: object, rows: Tensor) -> None:
        if self.again is None:
            self.tensors = self.tensors or [[] for _ in stored]
            for parts, x in zip(self.tensors, stored, strict=True):
                parts.append(x.to(self.device))
        self.targets.append(to_device(target, torch.device("cpu")))
        self.rows.append(rows)

    def joined(self, *, pin: bool) -> ReplayGroup:
        """Joins the batches, and page-locks tensors on the CPU to copy them to a GPU if `pin`."""
        tensors = []
        for parts, layout in zip(self.tensors, self.plan.layouts, strict=bool(self.tensors)):
            x = _concatenate(parts, layout.dim)
            if pin and x.device.type == "cpu":
                x = x.pin_memory()
            tensors.append(x)
            parts.clear()
        return ReplayGroup(
            self.plan, tensors, joined_targets(self.targets), torch.cat(self.rows), self.again
        )


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


def _group_with_room(
    groups: list[_GrowingGroup],
    plan: Plan,
    nbytes: int,  # size of the tensors of a batch
    memory: dict[torch.device, int],  # free bytes
    again: Recompute | None,
) -> _GrowingGroup:
    """Chooses the memory for a batch, and returns the group of its plan in that memory."""
    fitting = [device for device, room in memory.items() if nbytes <= room]
    device = fitting[0] if fitting else torch.device("cpu")
    if fitting:
        again = None
    if again is None:
        memory[device] -= nbytes
    for group in groups:
        is_like = group.plan is plan and group.device == device
        if is_like and (group.again is None) == (again is None):
            return group
    groups.append(_GrowingGroup(plan, device, again))
    return groups[-1]


@torch.no_grad()
def _recompute(model: EditableModel, plan: Plan, draw: Draw, rows: Tensor) -> list[Tensor]:
    parts = []
    for batch, rows_of_batch in draw(rows):
        stored = plan.record(model, inputs_of(batch), len(rows_of_batch))
        if stored is None:
            raise ReplayError(
                "`layer`: samples that were read again took another path through the model.",
                "raise `SearchOptions.memory_limit`, so that no samples must be read again.",
            )
        parts.append(stored)
    columns = zip(*parts, strict=True)
    return [torch.cat(x, layout.dim) for x, layout in zip(columns, plan.layouts, strict=True)]


@dataclass
class PassRecorder:
    """Finds plans for passes, and what to store of each pass."""

    model: EditableModel
    plans: list[ReplayPlan] = field(default_factory=list)
    whole_plans: list[WholePlan] = field(default_factory=list)
    fallback_reason: str | None = None  # why passes need the whole model
    _can_cut: bool | None = None  # unknown before the first batch

    def can_cut(self, inputs: Inputs, n: int) -> bool:
        """True if samples can be run without their batch; decided by the first batch."""
        if self._can_cut is None:
            self._can_cut = can_be_cut(self.model, inputs, n)
        return self._can_cut

    def record(self, inputs: Inputs, n: int) -> tuple[Plan, list[Tensor]]:
        """Runs a batch of `n` samples; returns its plan, which may be new, and what to store."""
        live_calls = {name for plan in self.plans for name in plan.live_calls}
        trace, logits = self.model.trace(inputs, live_calls.__contains__)
        for plan in self.plans:
            stored = plan.match(trace, inputs, n)
            if stored is not None:
                return self._checked(plan, stored, inputs, n, logits)
        if self.plans and all(tuple(trace.calls) != plan.calls for plan in self.plans):
            return self.record_whole(inputs, n, OTHER_ORDER)
        try:
            plan = find_replay_plan(self.model, inputs, n)
        except NotReplayableError as error:
            try:
                return self.record_last_layer(inputs, n)
            except InseparableBatchError:
                return self.record_whole(inputs, n, str(error))
        self.plans.append(plan)
        return self._checked(plan, plan.record(self.model, inputs, n), inputs, n, logits)

    def _checked(
        self, plan: ReplayPlan, stored: list[Tensor] | None, inputs: Inputs, n: int, logits: Tensor
    ) -> tuple[Plan, list[Tensor]]:
        if stored is not None:
            resumed = plan.resume(self.model, stored, n, lambda site, x, y: y)
            if same_values(resumed, logits, stored[-1].dtype):
                return plan, stored
        return self.record_whole(inputs, n, OTHER_OUTPUTS)

    def record_last_layer(self, inputs: Inputs, n: int) -> tuple[ReplayPlan, list[Tensor]]:
        """Replaces `record` for a batch that cannot be cut into samples.

        Raises:
            ConfigurationError: the model does not return one row of logits per sample.
            InseparableBatchError: more than one layer is repaired, or its output is not the logits.
        """
        model = self.model
        trace, logits = model.trace(inputs, lambda name: False)
        if len(logits) != n:
            raise ConfigurationError(
                f"`task`: the model returned logits {list(logits.shape)} for a batch of {n} "
                "samples.",
                "return one row per sample, or give an `adapter` that selects the inputs and the "
                "target of a batch.",
            )
        site = model.sites[trace.layer_order[0]]
        x, y = trace.input, trace.output
        assert x is not None
        assert y is not None
        if len(trace.layer_order) > 1 or not _gives_logits(model, inputs, x, y, logits):
            raise InseparableBatchError(
                f"`layer={site.name!r}`: samples cannot be taken out of these batches, and the "
                "layer does not return the model's logits, so no new weights can be searched for "
                "it.",
                "name the last Linear layer, or use a method that trains, such as "
                "`finetune-polish`.",
            )
        values, spec = flatten_last_layer(x, y)
        for plan in self.plans:
            if plan.select(values, spec, n) is not None:
                return plan, [x, y]
        plan = ReplayPlan.of_last_layer(site, x, y)
        self.plans.append(plan)
        return plan, [x, y]

    def record_whole(
        self, inputs: Inputs, n: int, reason: str = ""
    ) -> tuple[WholePlan, list[Tensor]]:
        """Replaces `record` for a batch that must run through the whole model, for a `reason`."""
        self.fallback_reason = self.fallback_reason or reason
        for plan in self.whole_plans:
            stored = plan.record(self.model, inputs, n)
            if stored is not None:
                return plan, stored
        plan = WholePlan.of(inputs, n)
        self.whole_plans.append(plan)
        return plan, plan.stored_among(pytree.tree_leaves(inputs))


def can_be_cut(model: EditableModel, inputs: Inputs, n: int) -> bool:
    """True if samples can be run without their batch. If in doubt, runs a few samples."""
    if is_sliceable(inputs, n):
        return True
    few = torch.tensor([0, 0]) if n == 1 else torch.arange(min(2, n - 1))
    try:
        logits_of_few = model.logits(index_batch(inputs, few, n), {})
        logits = model.logits(inputs, {})
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return len(logits) == n and same_values(logits_of_few, logits[few.to(logits.device)])


def _gives_logits(
    model: EditableModel, inputs: Inputs, x: Tensor, y: Tensor, logits: Tensor
) -> bool:
    """True if the only layer maps rows `x` to the logits, also under changed weights."""
    if len(x) != len(logits) or not same_values(y, logits):
        return False
    (site,), flat = model.space.sites, model.space.flat()
    everywhere = torch.arange(len(flat), device=flat.device)
    changed = model.space.changed(everywhere, perturbed(flat))
    with model.evaluator.context():
        output = output_under(changed, site, x)
    return same_values(output, model.logits(inputs, changed))
