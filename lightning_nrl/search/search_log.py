"""Results of a search, and `SearchLog`, which records searches on their device and does not wait
for the device.
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
    """Course of a search. Each tensor has one entry per iteration, on the CPU. Entry 0 is the
    initial population.
    """

    best: Tensor  # best fitness so far
    mean: Tensor  # mean of the iteration's finite fitnesses; NaN if none is finite
    patched: Tensor  # number of repaired samples of I_neg under the best candidate so far
    intact: Tensor  # number of kept samples of I_pos under the best candidate so far
    loss_failed: Tensor  # mean loss on I_neg under the best candidate so far
    loss_passed: Tensor  # mean loss on I_pos under the best candidate so far; NaN or 0 if the fitness does not use it
    diversity: Tensor  # standard deviation of a weight over the iteration's candidates, averaged over the weights

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


N_COLUMNS = (
    len(fields(SearchHistory)) + 1
)  # fields of `SearchHistory`, and iterations since the last improvement


class SearchLog:
    """Best candidates so far and the history of S searches, on the device of the search.

    Args:
        original: `S x K`, the weights before the repair, in the dtype of the search.
        iterations: maximum number of steps after the initial population.
        patience: iterations without improvement after which a search has ended.
        sizes: number of weights of each search; further columns of `original` are padding. None: K
            per search.
    """

    def __init__(
        self, original: Tensor, iterations: int, patience: int, sizes: Sequence[int] | None
    ) -> None:
        n_searches, n_weights = original.shape
        device, dtype = original.device, widest(original.device)
        self.done = -1
        self.patience = patience
        self.best = original
        self.best_fitness = torch.full((n_searches,), -math.inf, dtype=dtype, device=device)
        self.stale = torch.zeros_like(self.best_fitness)
        self.sizes = torch.tensor(
            [n_weights] * n_searches if sizes is None else list(sizes), device=device
        )
        self._best_scores = torch.zeros(4, n_searches, dtype=dtype, device=device)
        self._rows = torch.zeros(iterations + 1, N_COLUMNS, n_searches, dtype=dtype, device=device)

    @property
    def frozen(self) -> Tensor:
        """Mask of the searches that have ended, `S` bool. The best candidate of such a search no
        longer changes.
        """
        return self.stale >= self.patience

    def record(self, candidates: Tensor, scores: Scores, fitness: Tensor) -> Tensor:
        """Records one iteration: candidates, `S x P x K`, with their scores and fitness, `S x P`.

        Returns the fitness, with minus infinity where it is NaN or the search has ended.
        """
        fitness = fitness.to(self.best_fitness.dtype)
        fitness = fitness.masked_fill(fitness.isnan() | self.frozen[:, None], -math.inf)
        top, which = fitness.max(1)
        better = top > self.best_fitness
        leader = candidates.take_along_dim(which[:, None, None], 1)[:, 0]
        columns = (scores.patched, scores.intact, scores.loss_failed, scores.loss_passed)
        leading = torch.stack(
            [x.gather(1, which[:, None])[:, 0].to(fitness.dtype) for x in columns]
        )
        self.best = torch.where(better[:, None], leader, self.best)
        self.best_fitness = torch.where(better, top, self.best_fitness)
        self._best_scores = torch.where(better, leading, self._best_scores)
        self.stale = torch.where(better, 0.0, self.stale + 1)
        self.done += 1
        finite = fitness.isfinite()
        mean = fitness.masked_fill(~finite, 0.0).sum(1) / finite.sum(1)
        std = (candidates - candidates.mean(1, keepdim=True)).square().mean(1).sqrt()
        diversity = (std.sum(1) / self.sizes).to(fitness.dtype)
        self._rows[self.done] = torch.stack(
            [self.best_fitness, mean, *self._best_scores, diversity, self.stale]
        )
        return fitness

    def read(self) -> Tensor:
        """Copies the rows of T iterations to the CPU, `T x N_COLUMNS x S`. Only this method waits
        for the device.
        """
        return self._rows[: self.done + 1].cpu()


def histories(rows: Tensor, patience: int) -> list[SearchHistory]:
    """Splits `rows`, the result of `SearchLog.read`, into one history per search, up to the end of
    that search.
    """
    stale = rows[:, -1]
    length = torch.arange(1, len(rows) + 1, device=rows.device)[:, None]
    ends = torch.where(stale < patience, len(rows), length).amin(0).tolist()
    columns = rows[:, :-1].double().unbind(2)
    return [
        SearchHistory(*(column[:end].clone() for column in search.unbind(1)))
        for search, end in zip(columns, ends, strict=True)
    ]
