"""`ChunkScorer`: scores many candidates on a chunk of the known data.

Chunks and blocks of candidates are sized for a memory budget and the CPU cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._utils.device import none_if_out_of_memory, widest
from lightning_nrl.search.fitness import FitnessFunction
from lightning_nrl.search.scoring.activation_cache import ActivationCache, Chunk
from lightning_nrl.search.scoring.candidate_tensor import as_dense
from lightning_nrl.search.scoring.last_layer_scorer import (
    HeadScorer,
    is_plain_multiclass,
    make_head_scorer,
    sum_over_samples,
)
from lightning_nrl.search.scoring.memory import peak_allocation
from lightning_nrl.search.scoring.sample_layout import repeat_all
from lightning_nrl.search.scoring.sparse_delta import (
    GatheredInputs,
    LayerDelta,
    edit_layers,
)
from lightning_nrl.tasks import Task

# Bytes of a last layer's logits per pass: what the CPU caches hold.
CPU_CACHE_BYTES = 1 << 20
# Bytes of all tensors that are alive at once in a pass; smaller passes are mostly overhead.
CPU_BLOCK_BYTES = 16 << 20
# The same on a GPU, also for a last layer's logits.
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
    total_weight: float = 0.0  # of the n samples
    is_head: bool = False  # True if the layer's outputs are the logits of a plain classifier
    gathered: GatheredInputs | None = None  # inputs of the first delta; None: gathered at each call
    head: HeadScorer | None = None  # scorer of a last layer; None: built at each call

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in (self.gathered, self.head) if kept is not None)

    def keep(self, room: int) -> None:
        """Sets `head` or `gathered` for later calls, unless this takes more than `room` bytes."""
        if room <= 0 or not self.cache.is_replayable(self.chunk):
            return
        if self.is_head:
            self.head = none_if_out_of_memory(self._make_head)
        elif len(self.first_delta.units):
            x, y = self.cache.activations(self.chunk)
            self.gathered = none_if_out_of_memory(partial(self.first_delta.gather, x, y))
        if self.nbytes > room:
            self.head = self.gathered = None

    def sums(self, values: Tensor, fitness: FitnessFunction, *, with_loss: bool = True) -> Tensor:
        """Returns the result of `sum_over_samples`, `4 x P`, for candidates `P x K`."""
        parts = []
        start = 0
        while start < len(values):
            block = values[start : start + max(1, self.rows // len(self.chunk))]
            results = none_if_out_of_memory(
                partial(self.evaluate, block, with_loss), last_try=self.rows <= 1
            )
            if results is None:
                self.rows //= 2
                continue
            parts.append(sum_over_samples(*results, self.weight, fitness))
            start += len(block)
        return torch.cat(parts, 1)

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
        """Returns the mask of passed samples and the losses, `P x n` each.

        The losses are None unless `with_loss`.
        """
        if self.rows >= len(self.chunk):
            if self.is_head:
                head = self.head or self._make_head()
                return head.evaluate(values, with_loss)
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
            logits = as_dense(self.cache.replay(chunk, edit, copies=n_candidates))
        else:
            changed = [self.cache.space.changed(self.where, candidate) for candidate in values]
            logits = torch.cat([self.cache.rerun(chunk, parameters) for parameters in changed])
        target = repeat_all(chunk.target, n_candidates)
        if reserve is not None:
            reserve = reserve.repeat(n_candidates)
        passed, loss = self.task.passed_and_loss(logits, target, reserve, with_loss)
        passed = passed.view(n_candidates, -1)
        return passed, None if loss is None else loss.view(n_candidates, -1)


@dataclass(frozen=True)
class ChunkScorerFactory:
    """Builds scorers of samples for one choice of weights."""

    cache: ActivationCache
    deltas: tuple[LayerDelta, ...]
    where: Tensor  # K int64, flat positions of the changed weights
    task: Task
    budget: int  # bytes per pass
    # By row of the results; None: no minimum margin to pass, equal sample weights (float64).
    reserve: Tensor | None
    weight: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.cache.space.device

    @torch.no_grad()
    def scorers_of(self, mask: Tensor, room: int) -> list[ChunkScorer]:
        """Builds one scorer per chunk of the samples in `mask`, `N` bool.

        The scorers keep at most `room` bytes between calls.
        """
        scorers = []
        for group in self.cache.chunks(None, mask):
            for scorer in self._scorers_of_group(group):
                scorer.keep(room)
                room -= scorer.nbytes
                scorers.append(scorer)
        return scorers

    def _scorers_of_group(self, group: Chunk) -> list[ChunkScorer]:
        scorer = self._scorer(group, 1, is_head=False)
        if not self.cache.is_replayable(group):
            scorer.rows = _rows_per_pass(scorer, self.budget, GPU_BLOCK_BYTES)
            return [scorer]
        _, y = self.cache.activations(next(iter(self.cache.split(group, 1))))
        n_units = len(scorer.first_delta.units)
        is_head = (
            self.cache.plan(group).is_last_layer
            and n_units > 0
            and y.dtype in (torch.float32, torch.float64)
            and y.ndim == 2
            and is_plain_multiclass(self.task)
        )
        logit_bytes, block_bytes, most_samples = GPU_BLOCK_BYTES, GPU_BLOCK_BYTES, MAX_SAMPLES_GPU
        if self.device.type == "cpu":
            logit_bytes, block_bytes, most_samples = (
                CPU_CACHE_BYTES,
                CPU_BLOCK_BYTES,
                MAX_SAMPLES_CPU,
            )
        if is_head:
            rows = max(1, min(logit_bytes, self.budget // 6) // (n_units * y.element_size()))
            samples = rows
        else:
            rows = _rows_per_pass(scorer, self.budget, block_bytes)
            samples = max(1, int(rows**0.5))  # a block of as many candidates as samples
        chunks = self.cache.split(group, min(most_samples, samples))
        return [self._scorer(chunk, rows, is_head) for chunk in chunks]

    def _scorer(self, chunk: Chunk, rows: int, is_head: bool) -> ChunkScorer:
        scorer = ChunkScorer(self.cache, chunk, self.deltas, self.where, self.task, rows)
        scorer.is_head = is_head
        scorer.total_weight = len(chunk)
        if self.reserve is not None:
            scorer.reserve = self.reserve[chunk.rows].to(self.device)
        if self.weight is not None:
            weight = self.weight[chunk.rows].to("cpu", widest(self.device))
            scorer.total_weight = float(weight.sum())
            scorer.weight = weight.to(self.device)
        return scorer


def _rows_per_pass(scorer: ChunkScorer, budget: int, block_bytes: int) -> int:
    """Chooses the rows (candidates times samples) per pass, by the memory that a few rows take."""
    few = next(iter(scorer.cache.split(scorer.chunk, 2)))
    values = scorer.deltas[0].original.expand(8, -1)
    peak = none_if_out_of_memory(
        partial(peak_allocation, partial(scorer.outputs, few, None, values, True, None))
    )
    if peak is None:
        return 1
    n_rows = len(few)
    if scorer.cache.is_replayable(few):
        n_rows *= len(values)
    return max(1, min(budget, block_bytes) * n_rows // max(1, peak))
