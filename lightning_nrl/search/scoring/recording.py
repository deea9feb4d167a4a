"""Runs a model once over known data and stores the tensors from which its passes resume at the
first
repaired layer.

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
"""Reads samples again, given their rows in the results in ascending order; yields batches and their
samples' rows.
"""


@torch.no_grad()
def record(
    evaluator: Evaluator,
    batches: Iterable[
        tuple[Batch, Tensor]
    ],  # this rank's batches and their samples' rows in the results, int64
    space: ParameterSpace,
    keep: Tensor,  # N bool, the samples to store; entry i belongs to row i of the results
    *,
    budget: int | None = None,  # bytes on the model's device; None: half of the free memory
    draw: Draw
    | None = None,  # reads samples again whose tensors do not fit in memory; None: all tensors are stored
) -> ActivationCache:
    """Records the known data for a repair of `space`. Warns if some samples must run through the
    whole
    model.

    On a GPU, tensors beyond `budget` are stored in main memory, but at most in half of its free
    part. Raises a `ReplayError` if `space` has no layer, or if the model never calls one of its
    layers.
    """
    if not space.sites:
        raise ReplayError(space.obstacle)
    cache = ActivationCache(EditableModel(evaluator, space), [], torch.zeros(0, dtype=torch.int64))
    memory = {place: free_memory(place) // 2 for place in (space.device, torch.device("cpu"))}
    if budget is not None:
        memory[space.device] = budget
    can_recompute = draw is not None
    n_wanted = -(-int(keep.sum()) // evaluator.collective.world_size)
    sliceable: bool | None = None  # not known before the first batch
    for batch, rows in batches:
        poll()
        index = keep.cpu()[rows].nonzero().flatten()
        if not len(index):
            continue
        inputs: Inputs = (batch.args, batch.kwargs)
        target = batch.target
        if sliceable is None:
            sliceable = can_be_cut(cache.model, inputs, len(rows))
            # Inputs that cannot be sliced might be collated differently in the batches that are
            # read again.
            can_recompute &= sliceable and is_sliceable(inputs, len(rows))
        if len(index) < len(rows):
            target = index_batch(target, index, len(rows))
            inputs = index_batch(inputs, index, len(rows)) if sliceable else inputs
        if sliceable:
            group, stored = find_group(cache, inputs, len(index), space.device)
        else:
            group, stored = find_head_group(cache, inputs, len(rows), space.device)
            stored = [x.index_select(0, index.to(x.device)) for x in stored]
        again = None if draw is None else partial(_recompute_stored, cache.model, group, draw)
        group = _choose_group(cache, group, stored, memory, n_wanted, len(index), can_recompute)
        group.add(stored, target, rows[index], again)
    for group in cache.groups:
        group.finish(pin=space.device.type == "cuda" and group.device.type == "cpu")
    cache.rows = torch.cat([cache.rows, *(group.rows[0] for group in cache.groups)])
    if cache.fallback_reason is not None:
        warnings.warn(
            PerformanceWarning(
                f"`layer`: {cache.fallback_reason}, so every candidate is run through the whole model.",
                "the result is the same, only slower; another layer may be faster.",
            ),
            stacklevel=2,
        )
    return cache


def find_group(
    cache: ActivationCache, inputs: Inputs, n: int, device: torch.device
) -> tuple[ReplayGroup, list[Tensor]]:
    """Runs a batch of `n` samples. Returns its group, which may be new, and the tensors to store."""
    model = cache.model
    planned = [(group, group.plan) for group in cache.groups if group.plan is not None]
    live = {name for _, plan in planned for name in plan.live_calls}
    trace, logits = model.trace(inputs, live.__contains__)

    def replays(plan: ReplayPlan, stored: list[Tensor]) -> bool:
        return same_values(
            plan.resume(model, stored, n, lambda site, x, y: y), logits, stored[-1].dtype
        )

    for group, plan in planned:
        stored = plan.match(trace, inputs, n)
        if stored is not None:
            if replays(plan, stored):
                return group, stored
            return find_whole_group(cache, inputs, n, device, OTHER_OUTPUTS)
    if planned and all(tuple(trace.calls) != plan.calls for _, plan in planned):
        reason = "the order in which modules are called depends on the data"
        return find_whole_group(cache, inputs, n, device, reason)
    found = find_replay_plan(model, inputs, n)
    if isinstance(found, str):
        try:
            return find_head_group(cache, inputs, n, device)
        except InseparableBatchError:
            return find_whole_group(cache, inputs, n, device, found)
    trace, logits = model.trace(inputs, found.live_calls.__contains__)
    stored = found.match(trace, inputs, n)
    if stored is None or not replays(found, stored):
        return find_whole_group(cache, inputs, n, device, OTHER_OUTPUTS)
    cache.groups.append(ReplayGroup(found, found.layouts, device))
    return cache.groups[-1], stored


def can_be_cut(model: EditableModel, inputs: Inputs, n: int) -> bool:
    """True if samples can be run without their batch. If the inputs do not show this, it runs a few
    samples.
    """
    if is_sliceable(inputs, n):
        return True
    some = torch.tensor([0, 0]) if n == 1 else torch.arange(min(2, n - 1))
    try:
        few, whole = model.logits(index_batch(inputs, some, n), {}), model.logits(inputs, {})
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return len(whole) == n and same_values(few, whole[some.to(whole.device)])


def find_head_group(
    cache: ActivationCache, inputs: Inputs, n: int, device: torch.device
) -> tuple[ReplayGroup, list[Tensor]]:
    """Replaces `find_group` for a batch that cannot be cut into samples. The repaired layer must
    return the logits.

    Raises a `ConfigurationError` if the model does not return one row of logits per sample, and an
    `InseparableBatchError` if more than one layer is repaired or if the layer's output is not the
    logits.
    """
    model = cache.model
    trace, logits = model.trace(inputs, lambda name: False)
    if len(logits) != n:
        raise ConfigurationError(
            f"`task`: the model returned logits {list(logits.shape)} for a batch of {n} samples.",
            "return one row per sample, or give an `adapter` that selects the inputs and the target of a batch.",
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
            f"`layer={first.name!r}`: samples cannot be taken out of these batches, and the layer does not return the "
            "model's logits, so no new weights can be searched for it.",
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
    """Does the work of `find_group` for a batch that must run through the whole model. `reason`
    says why.
    """
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
    """Chooses the memory for a batch. Returns the group like `group` in that memory, and creates it
    if needed.
    """
    # Equal tensors are stored once, such as the input of a residual block, which is also the input
    # of its shortcut.
    same = tuple(
        next(
            j for j, y in enumerate(stored) if y is x or (y.dtype == x.dtype and torch.equal(y, x))
        )
        for x in stored
    )
    nbytes = sum(stored[i].nbytes for i in set(same))
    fitting = next((device for device, left in memory.items() if nbytes <= left), None)
    device, recomputed = fitting or list(memory)[-1], fitting is None and can_recompute
    if not recomputed:
        memory[device] -= nbytes
    if not group.rows:
        group.device, group.recomputed, group.same = device, recomputed, same
        fits = nbytes * (n_wanted / n - 1) <= memory[device]
        group.expected = n_wanted if len(cache.groups) == 1 and fits else 0
    for other in cache.groups:
        place = other.device, other.recomputed, other.same
        if other.constants is group.constants and place == (device, recomputed, same):
            return other
    cache.groups.append(group.empty_like(device, recomputed, same))
    return cache.groups[-1]


@torch.no_grad()
def _recompute_stored(
    model: EditableModel, group: ReplayGroup, draw: Draw, rows: Tensor
) -> list[Tensor]:
    parts = []
    for batch, own in draw(rows):
        inputs: Inputs = (batch.args, batch.kwargs)
        if group.plan is None:
            stored: list[Tensor] | None = split_inputs(inputs, len(own), group.device)[1]
        else:
            trace, _ = model.trace(inputs, group.plan.live_calls.__contains__)
            stored = group.plan.match(trace, inputs, len(own))
        if stored is None:
            raise ReplayError(
                "`layer`: samples that were read again took another path through the model.",
                "raise `SearchOptions.memory_limit`, so that no samples must be read again.",
            )
        parts.append(stored)
    return [
        torch.cat(xs, layout.dim)
        for xs, layout in zip(zip(*parts, strict=True), group.layouts, strict=True)
    ]
