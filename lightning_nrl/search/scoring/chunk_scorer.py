"""`ChunkScorer`: scores many candidates on a chunk of the known data.

Chunks and blocks of candidates are sized for a memory budget and the CPU cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

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
from lightning_nrl.search.scoring.sparse_delta import GatheredInputs, LayerDelta, edit_layers
from lightning_nrl.tasks import Task


class PassSize(NamedTuple):
    """Largest size of a pass on a kind of device."""

    logit_bytes: int  # of a last layer's logits; on a CPU, what its caches hold
    block_bytes: int  # of all tensors that are alive at once; smaller passes are mostly overhead
    samples: int  # per chunk


ON_CPU = PassSize(1 << 20, 16 << 20, 512)
ON_GPU = PassSize(256 << 20, 256 << 20, 16_384)  # slow if a kernel gets few samples


@dataclass(frozen=True)
class ScoringData:
    """What all scorers of one choice of weights share.

    Entry i of `reserve` and `weight` is of row i of the results.
    """

    cache: ActivationCache
    deltas: tuple[LayerDelta, ...]  # one per repaired layer (site)
    where: Tensor  # K int64, flat positions of the changed weights
    task: Task
    fitness: FitnessFunction
    budget: int  # bytes per pass
    reserve: Tensor | None  # N, minimum margin of a sample to pass; None: no minimum
    weight: Tensor | None  # N float64, sample weights; None: equal weights

    @torch.no_grad()
    def scorers_of(self, mask: Tensor, room: int, *, of_passed: bool) -> list[ChunkScorer]:
        """Builds one scorer per chunk of the samples in `mask`, `N` bool.

        The scorers keep at most `room` bytes between calls. `of_passed` is True for I_pos.
        """
        scorers = []
        for group in self.cache.chunks(None, mask):
            for scorer in _scorers_of_group(ChunkScorer(self, group, of_passed)):
                scorer.keep(room)
                room -= scorer.nbytes
                scorers.append(scorer)
        return scorers


@dataclass
class ChunkScorer:
    """Scores candidates on the `n` samples of a chunk."""

    data: ScoringData
    chunk: Chunk
    of_passed: bool  # True for samples of I_pos
    rows: int = 1  # candidates times samples per pass; halved permanently when memory runs out
    is_head: bool = False  # True if the layer's outputs are the logits of a plain classifier
    gathered: GatheredInputs | None = None  # inputs of the first delta; None: gathered at each call
    head: HeadScorer | None = None  # scorer of a last layer; None: built at each call

    def __post_init__(self) -> None:
        device, rows = self.data.cache.space.device, self.chunk.rows
        self.reserve = self.weight = None
        if self.data.reserve is not None:
            self.reserve = self.data.reserve[rows].to(device)
        if self.data.weight is not None:
            self.weight = self.data.weight[rows].to("cpu", widest(device)).to(device)

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in (self.gathered, self.head) if kept is not None)

    def keep(self, room: int) -> None:
        """Sets `head` or `gathered` for later calls, unless this takes more than `room` bytes."""
        cache = self.data.cache
        if room <= 0 or not cache.is_replayable(self.chunk):
            return
        if self.is_head:
            self.head = none_if_out_of_memory(self._make_head)
        elif len(self.first_delta.units):
            x, y = cache.activations(self.chunk)
            self.gathered = none_if_out_of_memory(partial(self.first_delta.gather, x, y))
        if self.nbytes > room:
            self.head = self.gathered = None

    def sums(self, values: Tensor) -> Tensor:
        """Returns the result of `sum_over_samples`, `4 x P`, for candidates `P x K`."""
        fitness = self.data.fitness
        with_loss = fitness.uses_passed_loss or not self.of_passed
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
            parts.append(sum_over_samples(*results, self.weight, fitness, of_passed=self.of_passed))
            start += len(block)
        return torch.cat(parts, 1)

    @property
    def first_delta(self) -> LayerDelta:
        first = self.data.cache.plan(self.chunk).first
        return next(delta for delta in self.data.deltas if delta.site is first)

    def _make_head(self) -> HeadScorer:
        x, y = self.data.cache.activations(self.chunk)
        label = self.data.task.label(self.chunk.target)
        assert label is not None
        return make_head_scorer(
            self.first_delta, self.first_delta.gather(x, y), y, label, self.reserve
        )

    def evaluate(self, values: Tensor, with_loss: bool = True) -> tuple[Tensor, Tensor | None]:
        """Returns the mask of passed samples and the losses, `P x n` each.

        The losses are None unless `with_loss`.
        """
        if self.is_head and self.rows >= len(self.chunk):
            head = self.head or self._make_head()
            return head.evaluate(values, with_loss)
        masks, losses, start = [], [], 0
        for chunk in self.data.cache.split(self.chunk, self.rows):
            stop = start + len(chunk)
            reserve = None if self.reserve is None else self.reserve[start:stop]
            passed, loss = self.outputs(chunk, values, with_loss, reserve)
            masks.append(passed)
            if loss is not None:
                losses.append(loss)
            start = stop
        return torch.cat(masks, 1), torch.cat(losses, 1) if losses else None

    def outputs(
        self, chunk: Chunk, values: Tensor, with_loss: bool, reserve: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what `evaluate` returns, for some samples in one pass."""
        data, n_candidates = self.data, len(values)
        if data.cache.is_replayable(chunk):
            gathered = self.gathered if len(chunk) == len(self.chunk) else None
            edit = edit_layers(data.deltas, values, gathered)
            logits = as_dense(data.cache.replay(chunk, edit, copies=n_candidates))
        else:
            changed = [data.cache.space.changed(data.where, candidate) for candidate in values]
            logits = torch.cat([data.cache.rerun(chunk, parameters) for parameters in changed])
        target = repeat_all(chunk.target, n_candidates)
        if reserve is not None:
            reserve = reserve.repeat(n_candidates)
        passed, loss = data.task.passed_and_loss(logits, target, reserve, with_loss)
        passed = passed.view(n_candidates, -1)
        return passed, None if loss is None else loss.view(n_candidates, -1)


def _scorers_of_group(whole: ChunkScorer) -> list[ChunkScorer]:
    """Splits the scorer of a whole group into scorers of chunks."""
    data, group = whole.data, whole.chunk
    if not data.cache.is_replayable(group):
        return [replace(whole, rows=_rows_per_pass(whole, ON_GPU.block_bytes))]
    size = ON_GPU
    if data.cache.space.device.type == "cpu":
        size = ON_CPU
    _, y = data.cache.activations(next(data.cache.split(group, 1)))
    n_units = len(whole.first_delta.units)
    is_head = (
        data.cache.plan(group).is_last_layer
        and n_units > 0
        and y.dtype in (torch.float32, torch.float64)
        and y.ndim == 2
        and is_plain_multiclass(data.task)
    )
    if is_head:
        rows = max(1, min(size.logit_bytes, data.budget // 6) // (n_units * y.element_size()))
        samples = rows
    else:
        rows = _rows_per_pass(whole, size.block_bytes)
        samples = max(1, int(rows**0.5))  # a block of as many candidates as samples
    chunks = data.cache.split(group, min(size.samples, samples))
    return [ChunkScorer(data, chunk, whole.of_passed, rows, is_head) for chunk in chunks]


def _rows_per_pass(scorer: ChunkScorer, block_bytes: int) -> int:
    """Chooses the rows (candidates times samples) per pass, by the memory that a few rows take."""
    data = scorer.data
    few = next(data.cache.split(scorer.chunk, 2))
    values = data.deltas[0].original.expand(8, -1)
    peak = none_if_out_of_memory(
        partial(peak_allocation, partial(scorer.outputs, few, values, True, None))
    )
    if peak is None:
        return 1
    n_rows = len(few)
    if data.cache.is_replayable(few):
        n_rows *= len(values)
    return max(1, min(data.budget, block_bytes) * n_rows // max(1, peak))
