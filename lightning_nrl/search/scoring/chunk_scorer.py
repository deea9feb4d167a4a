"""`ChunkScorer`: scores many candidates on a chunk of the known data.

Chunks and blocks of candidates are sized for a memory budget and the CPU cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from lightning_nrl._utils.device import none_if_out_of_memory, widest
from lightning_nrl.search.scoring.activation_cache import ActivationCache, Chunk
from lightning_nrl.search.scoring.candidate_tensor import CandidateTensor
from lightning_nrl.search.scoring.last_layer_scorer import (
    HeadScorer,
    is_plain_multiclass,
    make_head_scorer,
    sum_over_samples,
)
from lightning_nrl.search.scoring.memory import measure_allocations
from lightning_nrl.search.scoring.sample_layout import repeat_all
from lightning_nrl.search.scoring.sparse_delta import (
    GatheredInputs,
    LayerDelta,
    edit_layers,
    make_layer_deltas,
)
from lightning_nrl.tasks import Task

# Bytes of the first site's output, or of a last layer's logits, per pass: what the CPU caches hold.
CPU_CACHE_BYTES = 1 << 20
# Bytes of all tensors that a pass creates on a CPU; smaller passes are mostly overhead.
CPU_BLOCK_BYTES = 16 << 20
# Bytes of all tensors, or of a last layer's logits, per pass on a GPU.
GPU_BLOCK_BYTES = 256 << 20
# Samples per chunk; a GPU is slow if a kernel gets few samples.
MAX_SAMPLES_CPU = 512
MAX_SAMPLES_GPU = 16_384


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
    gathered: GatheredInputs | None = None  # inputs of the first delta; None: gathered at each call
    head: HeadScorer | None = None  # scorer of a last layer; None: built at each call

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in (self.gathered, self.head) if kept is not None)

    def keep(self, room: int) -> None:
        """Sets `head` or `gathered` for later calls, unless this takes more than `room` bytes."""
        if self.is_head:
            self.head = self._make_head()
        elif len(self.first_delta.units):
            self.gathered = self.first_delta.gather(*self.cache.activations(self.chunk))
        if self.nbytes > room:
            self.head = self.gathered = None

    def sums(self, values: Tensor, with_loss: bool = True, with_credit: bool = False) -> Tensor:
        """Returns the result of `sum_over_samples`, `4 x P`, for candidates `P x K`."""
        parts: list[Tensor] = []
        start = 0
        while start < len(values):
            block = values[start : start + max(1, self.rows // len(self.chunk))]
            work = partial(self._sums_of_block, block, with_loss, with_credit)
            sums = none_if_out_of_memory(work, last_try=self.rows <= 1)
            if sums is None:
                self.rows //= 2
                continue
            parts.append(sums)
            start += len(block)
        return torch.cat(parts, 1)

    def _sums_of_block(self, values: Tensor, with_loss: bool, with_credit: bool) -> Tensor:
        # On a GPU, `count_passed` would have to wait for the device to know which samples are
        # decided.
        if self.is_head and not with_loss and values.device.type == "cpu":
            head = self.head or self._make_head()
            return head.count_passed(values, self.weight)
        passed, loss = self.evaluate(values, with_loss)
        return sum_over_samples(passed, loss, self.weight, with_credit)

    @property
    def first_delta(self) -> LayerDelta:
        first = self.cache.plan(self.chunk).first
        return next(delta for delta in self.deltas if delta.site is first)

    def _make_head(self) -> HeadScorer:
        x, y = self.cache.activations(self.chunk)
        label = self.task.label(self.chunk.target)
        assert label is not None
        gathered = self.first_delta.gather(x, y)
        return make_head_scorer(self.first_delta, gathered, y, label, self.reserve)

    def evaluate(self, values: Tensor, with_loss: bool = True) -> tuple[Tensor, Tensor | None]:
        """Returns the mask of passed samples and the losses, `P x n` each.

        The losses are None unless `with_loss`.
        """
        if self.is_head:
            head = self.head or self._make_head()
            return head.evaluate(values, with_loss)
        if self.rows >= len(self.chunk):
            return self.outputs(self.chunk, self.gathered, values, with_loss, self.reserve)
        masks, losses, start = [], [], 0
        for chunk in self.cache.split(self.chunk, self.rows):
            stop = start + len(chunk)
            reserve = None if self.reserve is None else self.reserve[start:stop]
            passed, loss = self.outputs(chunk, None, values, with_loss, reserve)
            masks.append(passed)
            if loss is not None:
                losses.append(loss)
            start = stop
        return torch.cat(masks, 1), torch.cat(losses, 1) if losses else None

    def outputs(
        self,
        chunk: Chunk,
        gathered: GatheredInputs | None,
        values: Tensor,
        with_loss: bool,
        reserve: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what `evaluate` returns, for the samples of `chunk` in one pass."""
        n_candidates = len(values)
        if self.cache.is_replayable(chunk):
            edit = edit_layers(self.deltas, values, gathered)
            logits = self.cache.replay(chunk, edit, copies=n_candidates)
            if isinstance(logits, CandidateTensor):
                logits = logits.dense_view()
        else:
            logits = self.cache.rerun(chunk, self.where, values)
        target = repeat_all(chunk.target, n_candidates)
        if reserve is not None:
            reserve = reserve.repeat(n_candidates)
        passed, loss = self.task.passed_and_loss(logits, target, reserve, with_loss)
        passed = passed.view(n_candidates, -1)
        return passed, None if loss is None else loss.view(n_candidates, -1)


@dataclass
class ChunkScorerFactory:
    """Builds scorers of samples for one choice of weights."""

    cache: ActivationCache
    where: Tensor  # K int64, flat positions of the changed weights
    task: Task
    budget: int  # bytes per pass
    # By row of the results; None: no minimum margin to pass, equal sample weights (float64).
    reserve: Tensor | None
    weight: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.cache.space.device

    @cached_property
    def deltas(self) -> tuple[LayerDelta, ...]:
        return make_layer_deltas(self.cache.space, self.where)

    @torch.no_grad()
    def scorers_of(self, mask: Tensor, room: int) -> list[ChunkScorer]:
        """Builds one scorer per chunk of the samples in `mask`, `N` bool.

        The scorers keep at most `room` bytes between calls. If memory runs out, smaller chunks are
        built, which keep nothing.
        """
        scorers: list[ChunkScorer] = []
        for group in self.cache.chunks(None, mask):
            scorers_of_group = self._scorers_of_group(group, room)
            room -= sum(scorer.nbytes for scorer in scorers_of_group)
            scorers += scorers_of_group
        return scorers

    def _scorers_of_group(self, group: Chunk, room: int) -> list[ChunkScorer]:
        cache, budget = self.cache, self.budget
        scorer = self._scorer(group, 1, is_head=False)
        if not cache.is_replayable(group):
            scorer.rows = _rows_per_pass(scorer, budget, 0)
            return [scorer]
        _, y = cache.activations(next(iter(cache.split(group, 1))))
        n_units = len(scorer.first_delta.units)
        is_head = (
            cache.plan(group).is_last_layer
            and n_units > 0
            and y.dtype in (torch.float32, torch.float64)
            and y.ndim == 2
            and is_plain_multiclass(self.task)
        )
        on_cpu = self.device.type == "cpu"
        if is_head:
            block_bytes = CPU_CACHE_BYTES if on_cpu else GPU_BLOCK_BYTES
            rows = max(1, min(block_bytes, budget // 6) // (n_units * y.element_size()))
            samples = rows
        else:
            rows = _rows_per_pass(scorer, budget, y.nbytes)
            samples = int(rows**0.5)  # a block of as many candidates as samples
        most_samples = MAX_SAMPLES_CPU if on_cpu else MAX_SAMPLES_GPU
        samples = max(1, min(most_samples, len(group), samples))
        scorers = none_if_out_of_memory(
            partial(self._scorers_of_chunks, group, samples, rows, is_head, room)
        )
        while scorers is None:
            samples = max(1, samples // 2)
            scorers = none_if_out_of_memory(
                partial(self._scorers_of_chunks, group, samples, rows, is_head, room=0),
                last_try=samples == 1,
            )
        return scorers

    def _scorers_of_chunks(
        self, group: Chunk, samples: int, rows: int, is_head: bool, room: int
    ) -> list[ChunkScorer]:
        scorers = []
        for chunk in self.cache.split(group, samples):
            scorer = self._scorer(chunk, rows, is_head)
            if room > 0:
                scorer.keep(room)
                room -= scorer.nbytes
            scorers.append(scorer)
        return scorers

    def _scorer(self, chunk: Chunk, rows: int, is_head: bool) -> ChunkScorer:
        scorer = ChunkScorer(self.cache, chunk, self.deltas, self.where, self.task, rows)
        scorer.is_head = is_head
        if self.reserve is not None:
            scorer.reserve = self.reserve[chunk.rows].to(self.device)
        if self.weight is not None:
            weight = self.weight[chunk.rows].to("cpu", widest(self.device))
            scorer.total_weight = float(weight.sum())
            scorer.weight = weight.to(self.device)
        return scorer


def _rows_per_pass(scorer: ChunkScorer, budget: int, y_bytes: int) -> int:
    """Chooses the rows (candidates times samples) per pass, by the memory that a few rows take.

    `y_bytes` is the size of the first site's output for one sample, 0 if it is not recorded.
    """
    few = next(iter(scorer.cache.split(scorer.chunk, 2)))
    original = scorer.deltas[0].original

    def measure(n_candidates: int) -> tuple[int, int]:
        values = original.expand(n_candidates, -1)
        return measure_allocations(partial(scorer.outputs, few, None, values, True, None))

    measures = none_if_out_of_memory(lambda: (measure(4), measure(8)))
    if measures is None:
        return 1
    (_, total_of_4), (peak, total_of_8) = measures
    is_batched = scorer.cache.is_replayable(scorer.chunk)
    n_rows = len(few) * 8 if is_batched else len(few)
    peak_of_row = peak / n_rows
    total_of_row = (total_of_8 - total_of_4) / (4 * len(few))
    fitting = int(budget / max(1, peak_of_row))
    if original.device.type != "cpu" or not y_bytes:
        return max(1, min(fitting, int(GPU_BLOCK_BYTES / max(1, peak_of_row))))
    wanted = int(CPU_BLOCK_BYTES / max(1, total_of_row))
    # From one to eight times the rows whose output the cache holds.
    cached = CPU_CACHE_BYTES // y_bytes
    wanted = min(max(wanted, cached), 8 * CPU_CACHE_BYTES // y_bytes)
    return max(1, min(fitting, wanted))
