"""A search algorithm in one screen, for tests of what any searcher can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nrl.search import RandomStreams, SearchOrigin


class Walk(NamedTuple):
    """A random local search in mid-flight."""

    candidates: Tensor  # S x P x K
    best: Tensor  # S x 1 x K
    best_fitness: Tensor  # S x 1
    searched: Tensor  # S x 1 x K, False at padding

    @property
    def threshold(self) -> Tensor:
        return self.best_fitness.expand(-1, self.candidates.shape[1])


@dataclass(frozen=True)
class RandomLocalSearch:
    """Candidates are drawn around the best one so far (Rastrigin 1963)."""

    step: float = 0.3
    n_candidates: int = 12
    iterations: int = 40
    patience: int = 20

    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Walk:
        original, first = origin.original[:, None], origin.first_candidates
        searched = (
            torch.ones_like(original, dtype=torch.bool)
            if origin.searched is None
            else origin.searched
        )
        worst = torch.full(original.shape[:2], -torch.inf, dtype=torch.float64)
        drawn = self._around(original, searched, streams)[:, first.shape[1] :]
        return Walk(torch.cat([first, drawn], 1), original, worst, searched)

    def ask(self, state: Walk, streams: RandomStreams) -> Walk:
        return state._replace(candidates=self._around(state.best, state.searched, streams))

    def tell(self, state: Walk, fitness: Tensor) -> Walk:
        top, which = fitness.max(1, keepdim=True)
        better = top > state.best_fitness
        best = torch.where(
            better[..., None], state.candidates.take_along_dim(which[..., None], 1), state.best
        )
        return state._replace(best=best, best_fitness=torch.where(better, top, state.best_fitness))

    def _around(self, centre: Tensor, searched: Tensor, streams: RandomStreams) -> Tensor:
        return (
            centre
            + self.step * streams.normal(centre, self.n_candidates, centre.shape[-1]) * searched
        )
