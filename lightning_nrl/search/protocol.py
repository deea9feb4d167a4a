"""What a search algorithm is: frozen settings, and three functions from state to state.

The loop (`lightning_nrl.search.loop`) owns the rest: history, patience, time, early giving up, the best candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lightning_nrl._utils.registry import Registry
from lightning_nrl.search.rng import RandomStreams
from lightning_nrl.search.weight_stats import WeightStats

__all__ = ["SEARCHERS", "SearchOrigin", "SearchState", "Searcher"]


@dataclass(frozen=True)
class SearchOrigin:
    """Where S searches begin, in the dtype in which they search: float32 or float64."""

    original: Tensor  # S x K, the weights before the repair, padded with finite values
    stats: WeightStats  # the distribution of the layer's weights; its tensors broadcast to S x K
    elites: Tensor | None = None  # S x M x K, known good weights, padded likewise; None: there are none
    searched: Tensor | None = None  # S x 1 x K bool, False at padding, which must never move; None: there is no padding

    @property
    def first_candidates(self) -> Tensor:
        """`S x (1 + M) x K`: the original weights, then the elites, padding as in the original."""
        original = self.original[:, None]
        if self.elites is None:
            return original
        elites = self.elites if self.searched is None else self.elites.where(self.searched, original)
        return torch.cat([original, elites], 1)


class SearchState(Protocol):
    """A search in mid-flight: a named tuple or a frozen dataclass of tensors, of S searches with P candidates each."""

    @property
    def candidates(self) -> Tensor:
        """`S x P x K`, to be scored."""
        ...

    @property
    def threshold(self) -> Tensor | None:
        """`S x P`: what a candidate's fitness has to exceed to matter, so that scoring it can be given up early.

        Never above the best fitness so far. None: every candidate's fitness matters, however low.
        """
        ...


State = TypeVar("State", bound=SearchState)


@runtime_checkable
class Searcher(Protocol[State]):
    """A search algorithm with its settings, such as `ParticleSwarm`.

    Its functions are pure but for the numbers that they draw from `streams`, one stream a search: a search among many
    has to do what it does alone. It may have a `label`, its name in the steps of a report.
    """

    @property
    def n_candidates(self) -> int:
        """P, how many candidates are scored in each iteration; there may be fewer elites than that."""
        ...

    @property
    def iterations(self) -> int:
        """Steps at most; with 0 only the first candidates are scored."""
        ...

    @property
    def patience(self) -> int:
        """Steps without a better fitness after which the search stops, at least 1."""
        ...

    def init(self, origin: SearchOrigin, streams: RandomStreams) -> State:
        """The first candidates, of which the first ones are `origin.first_candidates`, bit for bit."""
        ...

    def ask(self, state: State, streams: RandomStreams) -> State:
        """The next candidates."""
        ...

    def tell(self, state: State, fitness: Tensor) -> State:
        """Learns from the fitness of the state's candidates: `S x P`, larger is better, minus infinity for the worst.

        Once a search is over, all of its candidates are worth minus infinity.
        """
        ...


SEARCHERS: Registry[Searcher[Any]] = Registry(
    "searcher", "an object such as ParticleSwarm()", lambda value: isinstance(value, Searcher), group="searchers"
)
"""Search algorithms by name; each is a `method` of a repair, too."""
