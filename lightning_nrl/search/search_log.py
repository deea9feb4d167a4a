"""Results of a search, and `SearchLog`, which records a search without waiting for its device."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl.search.scores import Scores


@dataclass(frozen=True)
class SearchHistory:
    """Course of a search. Each tensor has one entry per iteration, on the CPU.

    Entry 0 is the initial population.
    """

    best: Tensor  # best fitness so far
    mean: Tensor  # mean of the iteration's finite fitnesses; NaN if none is finite
    patched: Tensor  # number of repaired samples of I_neg under the best candidate so far
    intact: Tensor  # number of kept samples of I_pos under the best candidate so far
    loss_failed: Tensor  # mean loss on I_neg under the best candidate so far
    loss_passed: Tensor  # the same on I_pos; NaN or 0 if the fitness does not use it
    diversity: Tensor  # standard deviation over the candidates, averaged over the weights

    def __len__(self) -> int:
        return len(self.best)


@dataclass(frozen=True)
class SearchResult:
    """Best candidate of one search, and how the search found it."""

    values: Tensor  # K, values of the localised weights
    fitness: float  # fitness of `values`
    original_fitness: float  # fitness of the unchanged weights
    iterations: int  # number of steps
    stopped: str  # reason why the search ended, in words
    history: SearchHistory
    seconds: float  # wall time
    n_failed: int  # |I_neg|
    n_passed: int  # |I_pos|


# The fields of `SearchHistory`, and the number of iterations since the last improvement.
N_COLUMNS = len(fields(SearchHistory)) + 1


class SearchLog:
    """Best candidate so far and the history of a search, on the device of the search.

    A search ends once `patience` iterations in a row were no improvement. Later iterations may be
    recorded, and change nothing.

    Args:
        original: `K`, the weights before the repair, in the dtype of the search.
        iterations: maximum number of steps after the initial population.
        patience: iterations without improvement after which the search has ended.
    """

    def __init__(self, original: Tensor, iterations: int, patience: int) -> None:
        device, dtype = original.device, widest(original.device)
        self.done = -1
        self.patience = patience
        self.best = original
        self.best_fitness = torch.full((1,), -math.inf, dtype=dtype, device=device)
        self._stale = torch.zeros_like(self.best_fitness)
        self._best_scores = torch.zeros(4, 1, dtype=dtype, device=device)
        self._rows = torch.zeros(iterations + 1, N_COLUMNS, dtype=dtype, device=device)

    def record(self, candidates: Tensor, scores: Scores, fitness: Tensor) -> Tensor:
        """Records one iteration: candidates, `P x K`, with their scores and fitness, `P`.

        Returns the fitness, with minus infinity where it is NaN or the search has ended.
        """
        fitness = fitness.to(self.best_fitness.dtype)
        has_ended = self._stale >= self.patience
        fitness = fitness.masked_fill(fitness.isnan() | has_ended, -math.inf)
        # Everything about the leader keeps a dimension of size 1: a plain index would wait.
        top, leader = fitness.max(0, keepdim=True)
        better = top > self.best_fitness
        columns = (scores.patched, scores.intact, scores.loss_failed, scores.loss_passed)
        leading = torch.stack([x.index_select(0, leader).to(fitness.dtype) for x in columns])
        self.best = torch.where(better, candidates.index_select(0, leader)[0], self.best)
        self.best_fitness = torch.where(better, top, self.best_fitness)
        self._best_scores = torch.where(better, leading, self._best_scores)
        self._stale = torch.where(better, 0.0, self._stale + 1)
        self.done += 1
        finite = fitness.isfinite()
        mean = fitness.masked_fill(~finite, 0.0).sum(0, keepdim=True) / finite.sum()
        std = (candidates - candidates.mean(0)).square().mean(0).sqrt()
        diversity = std.mean(0, keepdim=True).to(fitness.dtype)
        self._rows[self.done] = torch.cat(
            [self.best_fitness, mean, self._best_scores[:, 0], diversity, self._stale]
        )
        return fitness

    def read(self) -> tuple[SearchHistory, int]:
        """Returns the history up to the end of the search, and iterations since an improvement.

        Only this method waits for the device.
        """
        rows = self._rows[: self.done + 1].cpu()
        ends = (rows[:, -1] >= self.patience).nonzero().flatten().tolist()
        n_rows = ends[0] + 1 if ends else len(rows)
        columns = rows[:n_rows, :-1].double().unbind(1)
        history = SearchHistory(*(column.clone() for column in columns))
        return history, int(rows[n_rows - 1, -1])
