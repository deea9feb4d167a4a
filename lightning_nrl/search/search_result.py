"""What a search found: the arrow from search to judging."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["SearchHistory", "SearchResult"]


@dataclass(frozen=True)
class SearchHistory:
    """One entry an iteration, `T` each, on the CPU. Entry 0 is the starting swarm.

    Attributes:
        best: the best fitness so far.
        mean: the swarm's mean fitness, candidates with no finite fitness, and those given up because they broke
            too many, left out; NaN if that is all of them.
        patched: repaired samples of I_neg under the best candidate so far.
        intact: kept samples of I_pos under the best candidate so far.
        loss_failed: mean loss on I_neg under the best candidate so far.
        loss_passed: mean loss on I_pos under the best candidate so far; NaN if the fitness has no use for it.
        diversity: mean over weights of the particles' standard deviation.
    """

    best: Tensor
    mean: Tensor
    patched: Tensor
    intact: Tensor
    loss_failed: Tensor
    loss_passed: Tensor
    diversity: Tensor

    def __len__(self) -> int:
        return len(self.best)


@dataclass(frozen=True)
class SearchResult:
    """The best candidate of one run.

    Attributes:
        values: `K`, values of the localised weights.
        fitness: its fitness.
        original_fitness: the fitness of the unchanged weights.
        iterations: how many steps were made.
        stopped: why the search ended, in words.
        history: the curve of the search.
        seconds: wall time.
    """

    values: Tensor
    fitness: float
    original_fitness: float
    iterations: int
    stopped: str
    history: SearchHistory
    seconds: float
