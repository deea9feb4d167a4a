"""How known data is cut into chunks: as large as the memory allows, and no larger than a processor's cache likes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._scoring.activation_cache import ActivationCache, Chunk
from lightning_nrl._scoring.chunk_scorer import ChunkScorer
from lightning_nrl._scoring.head_scorer import is_plain_multiclass
from lightning_nrl._scoring.memory import measure_allocations
from lightning_nrl._scoring.sparse_delta import LayerDelta
from lightning_nrl._utils.out_of_memory import none_if_out_of_memory
from lightning_nrl._utils.precision import widest
from lightning_nrl.tasks import Task

__all__ = ["make_chunk_scorers"]

CPU_CACHE_BYTES = 1 << 20
"""Bytes of the first site's output, or of logits in front of a last layer, that a CPU works on at once, so that they
stay in its cache."""
CPU_BLOCK_BYTES = 16 << 20
"""Bytes that a pass over a block should make on a CPU, up to eight caches of them at once: less is all overhead."""
GPU_BLOCK_BYTES = 256 << 20
"""The same on a GPU, enough to keep it busy."""
MAX_SAMPLES_CPU, MAX_SAMPLES_GPU = 512, 16_384
"""Samples a chunk at most: a GPU is only busy with many of them a launch."""


@torch.no_grad()
def make_chunk_scorers(
    cache: ActivationCache,
    deltas: tuple[LayerDelta, ...],  # the change of each site
    where: Tensor,  # K int64, flat positions of the changed weights
    mask: Tensor,  # N bool by row of the results, which samples
    task: Task,
    *,
    budget: int,  # bytes that running a block may take
    room: int,  # bytes that may be kept from one call to the next
    reserve: Tensor | None = None,  # N by row of the results, the margin that each must keep to pass; None: any
    weight: Tensor | None = None,  # N float64 by row of the results, what each counts; None: all alike
) -> list[ChunkScorer]:
    """Cuts samples into chunks. Where memory runs out, into smaller ones of which nothing is kept between calls."""
    device = cache.space.device
    weight = None if weight is None else weight.to("cpu", widest(device))

    def scorer_of(chunk: Chunk, rows: int, is_head: bool = False) -> ChunkScorer:
        own_reserve, own = (None if x is None else x[chunk.rows] for x in (reserve, weight))
        total = len(chunk) if own is None else float(own.sum())
        own_reserve, own = (None if x is None else x.to(device) for x in (own_reserve, own))
        return ChunkScorer(cache, chunk, deltas, where, task, rows, own_reserve, own, total, is_head)

    def cut(group: Chunk, samples: int, make: Callable[[Chunk], ChunkScorer], room: int) -> list[ChunkScorer]:
        scorers = []
        for chunk in cache.split(group, samples):
            scorers.append(make(chunk))
            if room > 0:
                scorers[-1].keep(room)
                room -= scorers[-1].nbytes
        return scorers

    scorers: list[ChunkScorer] = []
    for group in cache.chunks(None, mask):
        whole = scorer_of(group, 1)
        if not cache.is_replayable(group):
            whole.rows = _rows_of_block(whole, budget, 0)
            scorers.append(whole)
            continue
        _, y = cache.activations(next(iter(cache.split(group, 1))))
        n_units = len(whole.first_delta.units)
        is_last = cache.plan(group).is_last_layer and n_units > 0 and y.dtype in (torch.float32, torch.float64)
        is_head = is_last and y.ndim == 2 and is_plain_multiclass(task)
        if is_head:
            block = CPU_CACHE_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
            rows = max(1, min(block, budget // 6) // (n_units * y.element_size()))
        else:
            rows = _rows_of_block(whole, budget, y.nbytes)
        most = MAX_SAMPLES_CPU if device.type == "cpu" else MAX_SAMPLES_GPU
        samples = max(1, min(most, len(group), rows if is_head else int(rows**0.5)))
        make = partial(scorer_of, rows=rows, is_head=is_head)
        made = none_if_out_of_memory(partial(cut, group, samples, make, room))
        while made is None:
            samples, room = max(1, samples // 2), 0
            made = none_if_out_of_memory(partial(cut, group, samples, make, 0), last_try=samples == 1)
        scorers += made
        room -= sum(scorer.nbytes for scorer in made)
    return scorers


def _rows_of_block(scorer: ChunkScorer, budget: int, y_bytes: int) -> int:
    """How many rows to run at once, by what a few of them take; the same on every run."""
    few = next(iter(scorer.cache.split(scorer.chunk, 2)))
    original = scorer.deltas[0].original

    def measure(p: int) -> tuple[int, int]:
        return measure_allocations(partial(scorer.outputs, few, None, original.expand(p, -1), True))

    measures = none_if_out_of_memory(lambda: (measure(4), measure(8)))
    if measures is None:
        return 1
    (_, total_of_4), (peak, total_of_8) = measures
    together = len(few) * (8 if scorer.cache.is_replayable(scorer.chunk) else 1)
    peak_of_row, total_of_row = peak / together, (total_of_8 - total_of_4) / (4 * len(few))
    fitting = int(budget / max(1, peak_of_row))
    if original.device.type != "cpu" or not y_bytes:
        return max(1, min(fitting, int(GPU_BLOCK_BYTES / max(1, peak_of_row))))
    wanted = int(CPU_BLOCK_BYTES / max(1, total_of_row))
    wanted = min(max(wanted, CPU_CACHE_BYTES // y_bytes), 8 * CPU_CACHE_BYTES // y_bytes)
    return max(1, min(fitting, wanted))
