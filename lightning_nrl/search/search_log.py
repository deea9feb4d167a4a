"""Results of a search, and a log of S searches with a row of numbers per iteration.

Everything stays on the device until `SearchLog.read`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl.search.scores import Scores


@dataclass(frozen=True)
class SearchHistory:
    """One entry an iteration, `T` each, on the CPU. Entry 0 is the starting swarm.

    Candidates with no finite fitness, and those given up because they broke too many, have no part in the mean.
    """

    best: Tensor  # the best fitness so far
    mean: Tensor  # of the swarm's fitness; NaN if no candidate has any
    patched: Tensor  # repaired samples of I_neg under the best candidate so far
    intact: Tensor  # kept samples of I_pos under it
    loss_failed: Tensor  # mean loss on I_neg under it
    loss_passed: Tensor  # mean loss on I_pos under it; NaN if the fitness has no use for it
    diversity: Tensor  # mean over weights of the particles' standard deviation

    def __len__(self) -> int:
        return len(self.best)


@dataclass(frozen=True)
class SearchResult:
    """The best candidate of one run."""

    values: Tensor  # K, of the localised weights
    fitness: float
    original_fitness: float  # that of the unchanged weights
    iterations: int  # how many steps were made
    stopped: str  # why the search ended, in words
    history: SearchHistory  # the curve of the search
    seconds: float  # wall time


N_COLUMNS = len(fields(SearchHistory)) + 1
"""Numbers kept of each iteration: those of `SearchHistory`, and how many iterations ago the fitness grew."""


class SearchLog:
    """The best candidates so far, and a history of up to `iterations + 1` iterations.

    `original`, `S x K`, is in the dtype of the search; `sizes` says how many of the K weights each search has.
    """

    def __init__(self, original: Tensor, iterations: int, patience: int, sizes: Sequence[int] | None) -> None:
        n_searches, n_weights = original.shape
        device, dtype = original.device, widest(original.device)
        self.done = -1
        self.patience = patience
        self.best = original
        self.best_fitness = torch.full((n_searches,), -math.inf, dtype=dtype, device=device)
        self.stale = torch.zeros_like(self.best_fitness)
        self.sizes = torch.tensor([n_weights] * n_searches if sizes is None else list(sizes), device=device)
        self._best_scores = torch.zeros(4, n_searches, dtype=dtype, device=device)
        self._rows = torch.zeros(iterations + 1, N_COLUMNS, n_searches, dtype=dtype, device=device)

    @property
    def frozen(self) -> Tensor:
        """`S` bool, searches that are over: no fitness counts any more."""
        return self.stale >= self.patience

    def record(self, candidates: Tensor, scores: Scores, fitness: Tensor) -> Tensor:
        """Records an iteration of candidates, `S x P x K`; returns their fitness, `S x P`, as it counts.

        Minus infinity for NaN and for searches that are over.
        """
        fitness = fitness.to(self.best_fitness.dtype)
        fitness = fitness.masked_fill(fitness.isnan() | self.frozen[:, None], -math.inf)
        top, which = fitness.max(1)
        better = top > self.best_fitness
        leader = candidates.take_along_dim(which[:, None, None], 1)[:, 0]
        columns = (scores.patched, scores.intact, scores.loss_failed, scores.loss_passed)
        leading = torch.stack([x.gather(1, which[:, None])[:, 0].to(fitness.dtype) for x in columns])
        self.best = torch.where(better[:, None], leader, self.best)
        self.best_fitness = torch.where(better, top, self.best_fitness)
        self._best_scores = torch.where(better, leading, self._best_scores)
        self.stale = torch.where(better, 0.0, self.stale + 1)
        self.done += 1
        finite = fitness.isfinite()
        mean = fitness.masked_fill(~finite, 0.0).sum(1) / finite.sum(1)
        std = (candidates - candidates.mean(1, keepdim=True)).square().mean(1).sqrt()
        diversity = (std.sum(1) / self.sizes).to(fitness.dtype)
        self._rows[self.done] = torch.stack([self.best_fitness, mean, *self._best_scores, diversity, self.stale])
        return fitness

    def read(self) -> Tensor:
        """Returns the iterations so far, `T x N_COLUMNS x S`, on the CPU. Only here the host waits for the device."""
        return self._rows[: self.done + 1].cpu()


def histories(rows: Tensor, patience: int) -> list[SearchHistory]:
    """Returns one history a search, as long as it went on, from what `SearchLog.read` returned."""
    stale = rows[:, -1]
    length = torch.arange(1, len(rows) + 1, device=rows.device)[:, None]
    ends = torch.where(stale < patience, len(rows), length).amin(0).tolist()
    columns = rows[:, :-1].double().unbind(2)
    return [
        SearchHistory(*(column[:end].clone() for column in search.unbind(1)))
        for search, end in zip(columns, ends, strict=True)
    ]
