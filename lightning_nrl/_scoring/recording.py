"""Runs a model once over known data and keeps what is needed to resume its passes at the first repaired layer.

Nothing is taken on trust. The first pass of each shape is replayed under changed weights and compared with the whole
model, every later one under the original weights. What cannot be replayed is kept as model inputs and run as a whole:
slower, as exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_nrl._model.layers import ParameterSpace
from lightning_nrl._scoring.activation_cache import ActivationCache
from lightning_nrl._scoring.editable_model import EditableModel, Inputs
from lightning_nrl._scoring.plan_search import find_replay_plan, perturbed, same_values
from lightning_nrl._scoring.replay_group import ReplayGroup, split_inputs
from lightning_nrl._scoring.replay_plan import ReplayPlan
from lightning_nrl._scoring.sample_layout import index_batch
from lightning_nrl._scoring.sparse_delta import output_under
from lightning_nrl._utils.out_of_memory import is_out_of_memory
from lightning_nrl.data.batch import Batch, is_sliceable
from lightning_nrl.errors import ConfigurationError, InseparableBatchError, PerformanceWarning
from lightning_nrl.evaluation.evaluator import Evaluator

__all__ = ["can_be_cut", "find_group", "find_head_group", "find_whole_group", "record"]

OTHER_OUTPUTS = "replaying some samples gives other outputs than the whole model"


@torch.no_grad()
def record(
    evaluator: Evaluator,
    batches: Iterable[tuple[Batch, Tensor]],  # this rank's, with their rows in the results, n int64 on the CPU
    space: ParameterSpace,
    keep: Tensor,  # N bool by row of the results, which samples are wanted
    *,
    budget: int | None = None,  # bytes on the model's device, then on the CPU; None: half of a GPU's free ones
) -> ActivationCache:
    """Runs the model once over known data and keeps what a repair of `space` needs; warns of what is run as a whole.

    A layer that is never called is a `ReplayError`.
    """
    cache = ActivationCache(EditableModel(evaluator, space), [], torch.zeros(0, dtype=torch.int64))
    budget = _default_budget(space.device) if budget is None else budget
    held, device = 0, space.device
    sliceable: bool | None = None  # not known before the first batch
    for batch, rows in batches:
        index = keep.cpu()[rows].nonzero().flatten()
        if not len(index):
            continue
        inputs: Inputs = (batch.args, batch.kwargs)
        target = batch.target
        if sliceable is None:
            sliceable = can_be_cut(cache.model, inputs, len(rows))
        if len(index) < len(rows):
            target = index_batch(target, index, len(rows))
            inputs = index_batch(inputs, index, len(rows)) if sliceable else inputs
        if sliceable:
            group, stored = find_group(cache, inputs, len(index), device)
        else:
            group, stored = find_head_group(cache, inputs, len(rows), device)
            stored = [x.index_select(0, index.to(x.device)) for x in stored]
        held += sum(x.nbytes for x in stored)
        if device.type != "cpu" and held > budget:
            device = torch.device("cpu")
        _on_device(cache, group, device).add(stored, target, rows[index])
    for group in cache.groups:
        group.concatenate(pin=space.device.type == "cuda" and group.device.type == "cpu")
    cache.rows = torch.cat([cache.rows, *(group.rows[0] for group in cache.groups)])
    if cache.fallback_reason is not None:
        warnings.warn(
            PerformanceWarning(
                f"`layer`: {cache.fallback_reason}, so every candidate is run through the whole model.",
                "the repair is as exact, only slower; another layer may be faster.",
            ),
            stacklevel=2,
        )
    return cache


def find_group(
    cache: ActivationCache, inputs: Inputs, n: int, device: torch.device
) -> tuple[ReplayGroup, list[Tensor]]:
    """Runs `n` samples: the group that they belong to, added where none is like it, and what to store of them."""
    model = cache.model
    plans = [group.plan for group in cache.groups if group.plan is not None]
    live = {name for plan in plans for name in plan.live_calls}
    trace, logits = model.trace(inputs, live.__contains__)

    def replays(plan: ReplayPlan, stored: list[Tensor]) -> bool:
        return same_values(plan.resume(model, stored, n, lambda site, x, y: y), logits, stored[-1].dtype)

    for group in cache.groups:
        stored = None if group.plan is None else group.plan.match(trace, inputs, n)
        if group.plan is not None and stored is not None:
            if replays(group.plan, stored):
                return group, stored
            return find_whole_group(cache, inputs, n, device, OTHER_OUTPUTS)
    if plans and all(tuple(trace.calls) != plan.calls for plan in plans):
        reason = "the order in which modules are called depends on the data"
        return find_whole_group(cache, inputs, n, device, reason)
    plan = find_replay_plan(model, inputs, n)
    if isinstance(plan, str):
        try:
            return find_head_group(cache, inputs, n, device)
        except InseparableBatchError:
            return find_whole_group(cache, inputs, n, device, plan)
    trace, logits = model.trace(inputs, plan.live_calls.__contains__)
    stored = plan.match(trace, inputs, n)
    if stored is None or not replays(plan, stored):
        return find_whole_group(cache, inputs, n, device, OTHER_OUTPUTS)
    cache.groups.append(ReplayGroup(plan, plan.layouts, device))
    return cache.groups[-1], stored


def can_be_cut(model: EditableModel, inputs: Inputs, n: int) -> bool:
    """Whether the model gives the samples of a batch what it gives some of them, taken from its tensors.

    Where tensors are there that do not count samples, a pass with two of the samples says so.
    """
    if is_sliceable(inputs, n):
        return True
    some = torch.tensor([0, 0]) if n == 1 else torch.arange(min(2, n - 1))
    try:
        few, whole = model.logits(index_batch(inputs, some, n), {}), model.logits(inputs, {})
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if is_out_of_memory(error):  # which says nothing of the batch
            raise
        return False
    return len(whole) == n and same_values(few, whole[some.to(whole.device)])


def find_head_group(
    cache: ActivationCache, inputs: Inputs, n: int, device: torch.device
) -> tuple[ReplayGroup, list[Tensor]]:
    """As `find_group`, of a batch that is run as it is, whose samples nothing but the logits tells apart.

    An `InseparableBatchError` unless there is one layer, which gives the logits from one row a sample.
    """
    model = cache.model
    trace, logits = model.trace(inputs, lambda name: False)
    if len(logits) != n:
        raise ConfigurationError(
            f"`task`: the model returned logits {list(logits.shape)} for a batch of {n} samples.",
            "the model's output and the target must count the same samples; an `adapter` says what both are.",
        )
    stored = [] if trace.input is None or trace.output is None else [trace.input, trace.output]
    first = model.sites[trace.layer_order[0]]
    flat = model.space.flat()
    changed = model.space.changed(torch.arange(len(flat), device=flat.device), perturbed(flat))
    if (
        len(trace.layer_order) > 1
        or any(len(x) != n for x in stored)
        or not same_values(stored[1], logits)
        or not same_values(output_under(changed, first, stored[0]), model.logits(inputs, changed))
    ):
        raise InseparableBatchError(
            f"`layer={first.name!r}`: samples cannot be taken out of these batches, and the layer's output is not what "
            "the model returns as logits, so the layer cannot be searched.",
            "name the last Linear layer, or use a method that trains, such as `finetune-polish`.",
        )
    plan = ReplayPlan.of_last_layer(first, *stored)
    for group in cache.groups:
        if group.plan is not None and group.plan.is_like(plan):
            return group, stored
    cache.groups.append(ReplayGroup(plan, plan.layouts, device))
    return cache.groups[-1], stored


def find_whole_group(
    cache: ActivationCache, inputs: Inputs, n: int, device: torch.device, reason: str
) -> tuple[ReplayGroup, list[Tensor]]:
    """The same for a batch that is run as a whole, for a reason that is noted."""
    cache.fallback_reason = cache.fallback_reason or reason
    new, stored = split_inputs(inputs, n, device)
    for group in cache.groups:
        if group.holds_inputs_like(new, stored):
            return group, stored
    cache.groups.append(new)
    return new, stored


def _on_device(cache: ActivationCache, group: ReplayGroup, device: torch.device) -> ReplayGroup:
    """The group itself, or one for passes like its own that keeps them on another device."""
    if not group.rows:
        group.device = device
    same = (other for other in cache.groups if other.constants is group.constants and other.device == device)
    found = next(same, None)
    if found is None:
        found = replace(group, device=device, parts=[], targets=[], rows=[])
        cache.groups.append(found)
    return found


def _default_budget(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 62
