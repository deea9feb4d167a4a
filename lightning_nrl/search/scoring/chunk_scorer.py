"""`ChunkScorer`: scores many candidates on a chunk of the known data, sized for a memory budget and
the CPU cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._utils.device import none_if_out_of_memory, widest
from lightning_nrl.search.scoring.activation_cache import ActivationCache, Chunk
from lightning_nrl.search.scoring.candidate_tensor import CandidateTensor
from lightning_nrl.search.scoring.last_layer_scorer import (
    HeadScorer,
    Sums,
    is_plain_multiclass,
    make_head_scorer,
    summed,
)
from lightning_nrl.search.scoring.memory import in_blocks, measure_allocations
from lightning_nrl.search.scoring.sample_layout import repeat_all
from lightning_nrl.search.scoring.sparse_delta import GatheredInputs, LayerDelta, edit_layers
from lightning_nrl.tasks import Task


@dataclass
class ChunkScorer:
    """Scores candidates on the `n` samples of a chunk."""

    cache: ActivationCache
    chunk: Chunk
    deltas: tuple[LayerDelta, ...]  # one per repaired layer (site)
    where: Tensor  # K int64, flat positions of the changed weights
    task: Task
    rows: int  # candidates times samples per pass; halved permanently when memory runs out
    reserve: Tensor | None = None  # n, minimum margin of a sample to pass; None: no minimum
    weight: Tensor | None = None  # n, sample weights; None: equal weights
    total_weight: float = 0.0
    is_head: bool = False  # True if the layer's outputs are the logits of a plain classifier
    gathered: GatheredInputs | None = (
        None  # inputs of the first site's delta; None: gathered at each call
    )
    head: HeadScorer | None = None  # scorer of a last layer; None: built at each call

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in (self.gathered, self.head) if kept is not None)

    def keep(self, room: int) -> None:
        """Sets `head` (for a last layer) or `gathered` for later calls, unless this takes more than
        `room` bytes.
        """
        if self.is_head:
            self.head = self._make_head()
        elif len(self.first_delta.units):
            self.gathered = self.first_delta.gather(*self.cache.activations(self.chunk))
        if self.nbytes > room:
            self.head = self.gathered = None

    def sums(
        self, values: Tensor, with_loss: bool = True, with_credit: bool = False
    ) -> Iterator[tuple[slice, Sums]]:
        """Scores candidates `P x K` in blocks of candidates. Yields each block's slice of dimension
        P and its sums.
        """

        def work(_: slice, own: Tensor) -> Sums:
            # On a GPU, `count_passed` would have to wait for the device to know which samples are
            # decided.
            if self.is_head and not with_loss and values.device.type == "cpu":
                return Sums(*(self.head or self._make_head()).count_passed(own[0], self.weight))
            return summed(*self.evaluate(own[0], with_loss), self.weight, with_credit)

        yield from in_blocks(self, values[None], len(self.chunk), work)

    @property
    def first_delta(self) -> LayerDelta:
        first = self.cache.plan(self.chunk).first
        return next(delta for delta in self.deltas if delta.site is first)

    def _make_head(self) -> HeadScorer:
        x, y = self.cache.activations(self.chunk)
        label = self.task.label(self.chunk.target)
        assert label is not None
        return make_head_scorer(
            self.first_delta, self.first_delta.gather(x, y), y, label, self.reserve
        )

    def evaluate(self, values: Tensor, with_loss: bool = True) -> tuple[Tensor, Tensor | None]:
        """Returns the mask of passed samples and the losses, `P x n` each. The losses are None
        unless `with_loss`.
        """
        if self.is_head:
            return (self.head or self._make_head()).evaluate(values, with_loss)
        whole = self.rows >= len(self.chunk)
        chunks = [self.chunk] if whole else list(self.cache.split(self.chunk, self.rows))
        reserves = [None] * len(chunks) if self.reserve is None else self.reserve.split(self.rows)
        parts = [
            self.outputs(chunk, self.gathered if whole else None, values, with_loss, reserve)
            for chunk, reserve in zip(chunks, reserves, strict=True)
        ]
        losses = [loss for _, loss in parts if loss is not None]
        return torch.cat([passed for passed, _ in parts], 1), torch.cat(
            losses, 1
        ) if losses else None

    def outputs(
        self,
        chunk: Chunk,
        gathered: GatheredInputs | None,
        values: Tensor,
        with_loss: bool,
        reserve: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what `evaluate` returns, for the samples of `chunk` in one pass."""
        p = len(values)
        if self.cache.is_replayable(chunk):
            logits = self.cache.replay(chunk, edit_layers(self.deltas, values, gathered), copies=p)
            logits = logits.dense_view() if isinstance(logits, CandidateTensor) else logits
        else:
            logits = self.cache.rerun(chunk, self.where, values)
        own_reserve = None if reserve is None else reserve.repeat(p)
        passed, loss = self.task.passed_and_loss(
            logits, repeat_all(chunk.target, p), own_reserve, with_loss
        )
        return passed.view(p, -1), None if loss is None else loss.view(p, -1)


CPU_CACHE_BYTES = 1 << 20
"""Bytes of the first site's output, or of a last layer's logits, per pass on a CPU. They fit in the
CPU's cache.
"""
CPU_BLOCK_BYTES = (
    16 << 20
)  # bytes of all tensors that a pass creates on a CPU; smaller passes are mostly overhead
GPU_BLOCK_BYTES = 256 << 20  # bytes of all tensors, or of a last layer's logits, per pass on a GPU
MAX_SAMPLES_CPU, MAX_SAMPLES_GPU = (
    512,
    16_384,
)  # samples per chunk; a GPU is slow if a kernel gets few samples


@torch.no_grad()
def make_chunk_scorers(
    cache: ActivationCache,
    deltas: tuple[LayerDelta, ...],  # one per repaired layer
    where: Tensor,  # K int64, flat positions of the changed weights
    mask: Tensor,  # N bool, the samples to score; entry i belongs to row i of the results, as in `reserve`, `weight`
    task: Task,
    *,
    budget: int,  # bytes per pass
    room: int,  # bytes that may be kept between calls
    reserve: Tensor | None = None,  # N, minimum margin to pass; None: no minimum
    weight: Tensor | None = None,  # N float64, sample weights; None: equal weights
) -> list[ChunkScorer]:
    """Builds one scorer per chunk. If memory runs out, smaller chunks are built, which store
    nothing between calls.
    """
    device = cache.space.device
    weight = None if weight is None else weight.to("cpu", widest(device))

    def scorer_of(chunk: Chunk, rows: int, is_head: bool = False) -> ChunkScorer:
        own_reserve, own = (None if x is None else x[chunk.rows] for x in (reserve, weight))
        total = len(chunk) if own is None else float(own.sum())
        own_reserve, own = (None if x is None else x.to(device) for x in (own_reserve, own))
        return ChunkScorer(
            cache, chunk, deltas, where, task, rows, own_reserve, own, total, is_head
        )

    def cut(
        group: Chunk, samples: int, make: Callable[[Chunk], ChunkScorer], room: int
    ) -> list[ChunkScorer]:
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
            whole.rows = _rows_per_pass(whole, budget, 0)
            scorers.append(whole)
            continue
        _, y = cache.activations(next(iter(cache.split(group, 1))))
        n_units = len(whole.first_delta.units)
        is_last = (
            cache.plan(group).is_last_layer
            and n_units > 0
            and y.dtype in (torch.float32, torch.float64)
        )
        is_head = is_last and y.ndim == 2 and is_plain_multiclass(task)
        if is_head:
            block = CPU_CACHE_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
            rows = max(1, min(block, budget // 6) // (n_units * y.element_size()))
        else:
            rows = _rows_per_pass(whole, budget, y.nbytes)
        most = MAX_SAMPLES_CPU if device.type == "cpu" else MAX_SAMPLES_GPU
        samples = max(1, min(most, len(group), rows if is_head else int(rows**0.5)))
        make = partial(scorer_of, rows=rows, is_head=is_head)
        made = none_if_out_of_memory(partial(cut, group, samples, make, room))
        while made is None:
            samples, room = max(1, samples // 2), 0
            made = none_if_out_of_memory(
                partial(cut, group, samples, make, 0), last_try=samples == 1
            )
        scorers += made
        room -= sum(scorer.nbytes for scorer in made)
    return scorers


def _rows_per_pass(scorer: ChunkScorer, budget: int, y_bytes: int) -> int:
    """Chooses the rows (candidates times samples) per pass from the sizes of the tensors for a few
    rows.
    """
    few = next(iter(scorer.cache.split(scorer.chunk, 2)))
    original = scorer.deltas[0].original

    def measure(p: int) -> tuple[int, int]:
        return measure_allocations(
            partial(scorer.outputs, few, None, original.expand(p, -1), True, None)
        )

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
