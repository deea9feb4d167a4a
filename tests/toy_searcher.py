"""A search algorithm in one screen, for tests of what any searcher can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_nrl.search import RandomStream, Searcher, SearchOrigin


class Walk(NamedTuple):
    """State of a random local search."""

    candidates: Tensor  # P x K
    best: Tensor  # K
    best_fitness: Tensor  # 1

    @property
    def threshold(self) -> Tensor:
        return self.best_fitness.expand(len(self.candidates))


@dataclass(frozen=True)
class RandomLocalSearch(Searcher):
    """Draws candidates around the best one so far (Rastrigin 1963)."""

    step: float = 0.3
    n_candidates: int = 12
    iterations: int = 40
    patience: int = 20

    def init(self, origin: SearchOrigin, random: RandomStream) -> Walk:
        first = origin.first_candidates
        drawn = self.around(origin.original, random)[len(first) :]
        worst = torch.full((1,), -torch.inf, dtype=torch.float64)
        return Walk(torch.cat([first, drawn]), origin.original, worst)

    def ask(self, state: Walk, random: RandomStream) -> Walk:
        return state._replace(candidates=self.around(state.best, random))

    def tell(self, state: Walk, fitness: Tensor) -> Walk:
        top, leader = fitness.max(0, keepdim=True)
        if top <= state.best_fitness:
            return state
        return state._replace(best=state.candidates[leader][0], best_fitness=top)

    def around(self, centre: Tensor, random: RandomStream) -> Tensor:
        return centre + self.step * random.normal(centre, self.n_candidates, len(centre))
