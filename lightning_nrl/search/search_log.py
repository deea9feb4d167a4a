"""Search results, and a log of S searches that stays on the device until `SearchLog.read`."""

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
    """Course of a search: one entry per iteration, `T` each, on the CPU. Entry 0 is the initial population."""

    best: Tensor  # best fitness so far
    mean: Tensor  # mean of the finite fitnesses; NaN if there are none
    patched: Tensor  # repaired samples of I_neg under the best candidate so far
    intact: Tensor  # kept samples of I_pos under that candidate
    loss_failed: Tensor  # its mean loss on I_neg
    loss_passed: Tensor  # its mean loss on I_pos; NaN if the fitness does not use this loss
    diversity: Tensor  # standard deviation over candidates, averaged over weights

    def __len__(self) -> int:
        return len(self.best)


@dataclass(frozen=True)
class SearchResult:
    """Best candidate of one search."""

    values: Tensor  # K, of the localised weights
    fitness: float
    original_fitness: float  # fitness of the unchanged weights
    iterations: int  # number of steps
    stopped: str  # reason why the search ended
    history: SearchHistory
    seconds: float  # wall time


N_COLUMNS = len(fields(SearchHistory)) + 1
"""Numbers stored per iteration: the fields of `SearchHistory` and the iterations since the last improvement."""


class SearchLog:
    """Best candidates so far and the history of S searches.

    Args:
        original: `S x K`, in the dtype of the search.
        iterations: maximum number of iterations after the first.
        patience: iterations without improvement after which a search is frozen.
        sizes: number of weights per search; the rest of the K is padding. None: K.
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
        """Searches that have ended, `S` bool."""
        return self.stale >= self.patience

    def record(self, candidates: Tensor, scores: Scores, fitness: Tensor) -> Tensor:
        """Records the candidates of an iteration, `S x P x K`, and their scores.

        Returns:
            Their fitness, `S x P`, minus infinity where it is NaN or the search has ended.
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
        """Copies the iterations so far, `T x N_COLUMNS x S`, to the CPU: the only synchronisation."""
        return self._rows[: self.done + 1].cpu()


def histories(rows: Tensor, patience: int) -> list[SearchHistory]:
    """Splits the result of `SearchLog.read` into one history per search, cut where the search ended."""
    stale = rows[:, -1]
    length = torch.arange(1, len(rows) + 1, device=rows.device)[:, None]
    ends = torch.where(stale < patience, len(rows), length).amin(0).tolist()
    columns = rows[:, :-1].double().unbind(2)
    return [
        SearchHistory(*(column[:end].clone() for column in search.unbind(1)))
        for search, end in zip(columns, ends, strict=True)
    ]
