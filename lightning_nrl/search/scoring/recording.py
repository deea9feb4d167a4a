"""Runs a model once over known data and stores the tensors from which its passes resume.

Passes with the same calls and shapes form a group. Each resumed pass is compared with the whole
model: under changed weights for the first pass of a group, under the original weights for later
passes. Samples whose pass cannot be resumed are stored as model inputs and run through the whole
model. Tensors that do not fit in memory are recomputed each time they are needed. Which tensors fit
depends only on the sizes of tensors and on the memory budgets.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.interrupts import poll
from lightning_nrl.data.batch import Batch, is_sliceable
from lightning_nrl.errors import (
    ConfigurationError,
    InseparableBatchError,
    PerformanceWarning,
    ReplayError,
)
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.search.scoring.activation_cache import ActivationCache, ReplayGroup, split_inputs
from lightning_nrl.search.scoring.memory import free_memory
from lightning_nrl.search.scoring.replay_plan import (
    OTHER_ORDER,
    NotReplayableError,
    ReplayPlan,
    find_replay_plan,
    perturbed,
    same_values,
)
from lightning_nrl.search.scoring.sample_layout import index_batch
from lightning_nrl.search.scoring.sparse_delta import output_under
from lightning_nrl.search.scoring.traced_model import EditableModel, Inputs

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
    cache = ActivationCache(EditableModel(evaluator, space), [], torch.zeros(0, dtype=torch.int64))
    memory = {place: free_memory(place) // 2 for place in (space.device, torch.device("cpu"))}
    if budget is not None:
        memory[space.device] = budget
    can_recompute = draw is not None
    n_wanted = -(-int(keep.sum()) // evaluator.collective.world_size)
    can_cut: bool | None = None  # not known before the first batch
    for batch, rows in batches:
        poll()
        index = keep.cpu()[rows].nonzero().flatten()
        if not len(index):
            continue
        inputs: Inputs = (batch.args, batch.kwargs)
        target, n = batch.target, len(rows)
        if can_cut is None:
            can_cut = can_be_cut(cache.model, inputs, n)
            # Inputs that cannot be sliced might be collated differently in the batches that are
            # read again.
            can_recompute &= can_cut and is_sliceable(inputs, n)
        if len(index) < n:
            target = index_batch(target, index, n)
        if can_cut:
            if len(index) < n:
                inputs = index_batch(inputs, index, n)
            group, stored = find_group(cache, inputs, len(index), space.device)
        else:
            group, stored = find_head_group(cache, inputs, n, space.device)
            stored = [x.index_select(0, index.to(x.device)) for x in stored]
        again = None if draw is None else partial(_recompute_stored, cache.model, group, draw)
        group = _choose_group(cache, group, stored, memory, n_wanted, len(index), can_recompute)
        group.add(stored, target, rows[index], again)
    for group in cache.groups:
        group.finish(pin=space.device.type == "cuda" and group.device.type == "cpu")
    cache.rows = torch.cat([cache.rows, *(group.rows[0] for group in cache.groups)])
    if cache.fallback_reason is not None:
        reason = cache.fallback_reason
        warnings.warn(
            PerformanceWarning(
                f"`layer`: {reason}, so every candidate is run through the whole model.",
                "the result is the same, only slower; another layer may be faster.",
            ),
            stacklevel=2,
        )
    return cache


def find_group(
    cache: ActivationCache, inputs: Inputs, n: int, device: torch.device
) -> tuple[ReplayGroup, list[Tensor]]:
    """Runs a batch of `n` samples; returns its group, which may be new, and tensors to store."""
    model = cache.model
    planned = [(group, group.plan) for group in cache.groups if group.plan is not None]
    live_calls = {name for _, plan in planned for name in plan.live_calls}
    trace, logits = model.trace(inputs, live_calls.__contains__)

    def replays(plan: ReplayPlan, stored: list[Tensor]) -> bool:
        resumed = plan.resume(model, stored, n, lambda site, x, y: y)
        return same_values(resumed, logits, stored[-1].dtype)

    for group, plan in planned:
        stored = plan.match(trace, inputs, n)
        if stored is not None and replays(plan, stored):
            return group, stored
        if stored is not None:
            return find_whole_group(cache, inputs, n, device, OTHER_OUTPUTS)
    if planned and all(tuple(trace.calls) != plan.calls for _, plan in planned):
        return find_whole_group(cache, inputs, n, device, OTHER_ORDER)
    try:
        plan = find_replay_plan(model, inputs, n)
    except NotReplayableError as error:
        try:
            return find_head_group(cache, inputs, n, device)
        except InseparableBatchError:
            return find_whole_group(cache, inputs, n, device, str(error))
    trace, logits = model.trace(inputs, plan.live_calls.__contains__)
    stored = plan.match(trace, inputs, n)
    if stored is None or not replays(plan, stored):
        return find_whole_group(cache, inputs, n, device, OTHER_OUTPUTS)
    cache.groups.append(ReplayGroup(plan, plan.layouts, device))
    return cache.groups[-1], stored


def can_be_cut(model: EditableModel, inputs: Inputs, n: int) -> bool:
    """True if samples can be run without their batch.

    If the inputs do not show this, it runs a few samples.
    """
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


def find_head_group(
    cache: ActivationCache, inputs: Inputs, n: int, device: torch.device
) -> tuple[ReplayGroup, list[Tensor]]:
    """Replaces `find_group` for a batch that cannot be cut into samples.

    Raises:
        ConfigurationError: the model does not return one row of logits per sample.
        InseparableBatchError: more than one layer is repaired, or its output is not the logits.
    """
    model = cache.model
    trace, logits = model.trace(inputs, lambda name: False)
    if len(logits) != n:
        raise ConfigurationError(
            f"`task`: the model returned logits {list(logits.shape)} for a batch of {n} samples.",
            "return one row per sample, or give an `adapter` that selects the inputs and the "
            "target of a batch.",
        )
    site = model.sites[trace.layer_order[0]]
    x, y = trace.input, trace.output
    is_head = len(trace.layer_order) == 1 and x is not None and y is not None
    if x is None or y is None or not is_head or not _gives_logits(model, inputs, x, y, logits):
        raise InseparableBatchError(
            f"`layer={site.name!r}`: samples cannot be taken out of these batches, and the layer "
            "does not return the model's logits, so no new weights can be searched for it.",
            "name the last Linear layer, or use a method that trains, such as `finetune-polish`.",
        )
    plan = ReplayPlan.of_last_layer(site, x, y)
    for group in cache.groups:
        if group.plan is not None and group.plan.is_like(plan):
            return group, [x, y]
    cache.groups.append(ReplayGroup(plan, plan.layouts, device))
    return cache.groups[-1], [x, y]


def _gives_logits(
    model: EditableModel, inputs: Inputs, x: Tensor, y: Tensor, logits: Tensor
) -> bool:
    """True if the only layer maps rows `x` to the logits, also under changed weights."""
    if len(x) != len(logits) or not same_values(y, logits):
        return False
    (site,), flat = model.space.sites, model.space.flat()
    everywhere = torch.arange(len(flat), device=flat.device)
    changed = model.space.changed(everywhere, perturbed(flat))
    return same_values(output_under(changed, site, x), model.logits(inputs, changed))


def find_whole_group(
    cache: ActivationCache, inputs: Inputs, n: int, device: torch.device, reason: str
) -> tuple[ReplayGroup, list[Tensor]]:
    """Replaces `find_group` for a batch that must run through the whole model, for a `reason`."""
    cache.fallback_reason = cache.fallback_reason or reason
    new, stored = split_inputs(inputs, n, device)
    for group in cache.groups:
        if group.holds_inputs_like(new, stored):
            return group, stored
    cache.groups.append(new)
    return new, stored


def _choose_group(
    cache: ActivationCache,
    group: ReplayGroup,
    stored: list[Tensor],
    memory: dict[torch.device, int],
    n_wanted: int,  # number of samples to record in total
    n: int,  # number of samples in this batch
    can_recompute: bool,
) -> ReplayGroup:
    """Chooses the memory for a batch, and returns the group like `group` in that memory."""
    first_equal = _first_equal(stored)
    nbytes = sum(stored[i].nbytes for i in set(first_equal))
    fitting = [device for device, room in memory.items() if nbytes <= room]
    device = fitting[0] if fitting else list(memory)[-1]
    recomputed = not fitting and can_recompute
    if not recomputed:
        memory[device] -= nbytes
    if not group.rows:
        group.device, group.recomputed, group.first_equal = device, recomputed, first_equal
        all_fit = nbytes * (n_wanted / n - 1) <= memory[device]
        if all_fit and len(cache.groups) == 1:
            group.expected = n_wanted
    place = (device, recomputed, first_equal)
    for known in cache.groups:
        is_like = known.constants is group.constants
        if is_like and (known.device, known.recomputed, known.first_equal) == place:
            return known
    cache.groups.append(group.empty_like(device, recomputed, first_equal))
    return cache.groups[-1]


def _first_equal(stored: list[Tensor]) -> tuple[int, ...]:
    """Returns for each tensor the index of the first equal tensor, which alone is stored.

    The input of a residual block, for example, is also the input of its shortcut.
    """
    first_equal: list[int] = []
    for i, x in enumerate(stored):
        equal = (
            j for j in set(first_equal) if x.dtype == stored[j].dtype and torch.equal(x, stored[j])
        )
        first_equal.append(next(equal, i))
    return tuple(first_equal)


@torch.no_grad()
def _recompute_stored(
    model: EditableModel, group: ReplayGroup, draw: Draw, rows: Tensor
) -> list[Tensor]:
    parts = []
    for batch, rows_of_batch in draw(rows):
        inputs: Inputs = (batch.args, batch.kwargs)
        n = len(rows_of_batch)
        stored: list[Tensor] | None
        if group.plan is None:
            _, stored = split_inputs(inputs, n, group.device)
        else:
            trace, _ = model.trace(inputs, group.plan.live_calls.__contains__)
            stored = group.plan.match(trace, inputs, n)
        if stored is None:
            raise ReplayError(
                "`layer`: samples that were read again took another path through the model.",
                "raise `SearchOptions.memory_limit`, so that no samples must be read again.",
            )
        parts.append(stored)
    columns = zip(*parts, strict=True)
    return [torch.cat(x, layout.dim) for x, layout in zip(columns, group.layouts, strict=True)]
