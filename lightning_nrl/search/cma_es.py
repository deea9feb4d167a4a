"""CMA-ES (Hansen 2016) by the library `cmaes`, an extra: `pip install lightning_nrl[cmaes]`.

The library works on the CPU and on one search at a time. Candidates of all searches are still scored in one call.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError, check_choice, check_real
from lightning_nrl.search.first_positions import of_origin
from lightning_nrl.search.searcher import SEARCHERS, RandomStreams, SearchOrigin, check_numbers

Covariance = Literal["auto", "full", "diagonal"]
MOST_FULL = 320
"""Weights up to which `auto` takes the full covariance matrix: a little above what `default_n_weights` localises."""


class Evolution(NamedTuple):
    """S independent evolution strategies in mid-flight. The library's objects change when they are told something."""

    candidates: Tensor  # S x P x K
    original: Tensor  # S x K
    step: Tensor  # broadcasts to S x K, one standard deviation of the layer's weights: the unit of the search
    seeds: tuple[int, ...]  # one a search
    strategies: tuple[Any, ...] | None  # one a search; None before the first candidates are scored
    sizes: tuple[int, ...]  # how many of its K weights each search has

    @property
    def threshold(self) -> None:
        """The order of all candidates matters."""
        return None


@SEARCHERS.register("cma-es")
@dataclass(frozen=True)
class CmaEs:
    """The search by covariance matrix adaptation and its settings.

    The first candidates are the original weights, the elites, and some drawn around the original; the strategy begins
    at the best of them. Weights are searched in standard deviations of their layer. What is found is the best of all
    that was scored, so it is never worth less than the original weights.

    Attributes:
        population: candidates in a generation, at least 4.
        iterations: generations at most; 0 only scores the start.
        patience: generations without a better fitness after which the search stops, at least 1.
        sigma: the first step, in standard deviations of the layer's weights, above 0.
        covariance: `full`, which takes memory and time with the square and cube of the number of weights; `diagonal`
            (sep-CMA-ES, Ros & Hansen 2008); `auto`: `full` up to 320 weights.
    """

    label: ClassVar[str] = "CMA-ES"
    population: int = 50
    iterations: int = 300
    patience: int = 50
    sigma: float = 0.03
    covariance: Covariance = "auto"

    def __post_init__(self) -> None:
        check_numbers(self, population=4)
        check_real("CmaEs.sigma", self.sigma, "step", "give a finite number above 0.", above=0)
        check_choice("CmaEs.covariance", self.covariance, get_args(Covariance))
        _library()

    @property
    def n_candidates(self) -> int:
        return self.population

    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Evolution:
        """Scores the original weights, the elites and candidates around the original first."""
        original, first = origin.original, origin.first_candidates
        step = of_origin(origin.stats.std, origin).clamp_min(torch.finfo(original.dtype).tiny)
        drawn = self.sigma * step * streams.normal(original[:, None], self.population, original.shape[1])
        if origin.searched is not None:
            drawn = drawn.masked_fill(~origin.searched, 0.0)
        candidates = torch.cat([first, (original[:, None] + drawn)[:, first.shape[1] :]], 1)
        seeds = tuple(streams.seeds())
        sizes = streams.sizes or (original.shape[1],) * len(original)
        flat_step = (step[:, 0] if step.ndim == 3 else step).expand_as(original)
        return Evolution(candidates, original, flat_step, seeds, None, sizes)

    def ask(self, state: Evolution, streams: RandomStreams) -> Evolution:
        candidates = state.original[:, None].repeat(1, self.population, 1)
        for s, strategy in enumerate(state.strategies or ()):
            own = slice(state.sizes[s])
            drawn = torch.stack([torch.from_numpy(strategy.ask()) for _ in range(self.population)])
            candidates[s, :, own] += state.step[s, own] * drawn.to(candidates)
        return state._replace(candidates=candidates)

    def tell(self, state: Evolution, fitness: Tensor) -> Evolution:
        """Begins at the best of the first candidates; afterwards adapts, `fitness` being `S x P`. NaN is worst."""
        worth = fitness.double().cpu()
        worth = worth.masked_fill(worth.isnan(), -math.inf)
        if state.strategies is None:
            best = state.candidates.take_along_dim(worth.argmax(1).to(state.candidates.device)[:, None, None], 1)[:, 0]
            return state._replace(strategies=tuple(self._strategy(state, s, best[s]) for s in range(len(best))))
        for s, strategy in enumerate(state.strategies):
            if not bool(worth[s].isfinite().any()):
                continue  # over, or nothing to learn from
            own = slice(state.sizes[s])
            points = self._units(state, s, state.candidates[s, :, own]).numpy()
            # The library minimises, and takes finite numbers only.
            costs = (-worth[s]).clamp(max=torch.finfo(torch.float64).max).tolist()
            strategy.tell(list(zip(points, costs, strict=True)))
        return state

    def _strategy(self, state: Evolution, s: int, start: Tensor) -> Any:
        n_weights = state.sizes[s]
        most = {"full": n_weights, "auto": MOST_FULL}.get(self.covariance, 1)  # of one weight both are the same
        full = n_weights <= most
        library = _library()
        kind = library.CMA if full else library.SepCMA
        mean = self._units(state, s, start[:n_weights]).numpy()
        return kind(mean=mean, sigma=self.sigma, seed=state.seeds[s], population_size=self.population)

    def _units(self, state: Evolution, s: int, weights: Tensor) -> Tensor:
        own = slice(state.sizes[s])
        return ((weights - state.original[s, own]).double() / state.step[s, own].double()).cpu()


def _library() -> Any:
    try:
        return importlib.import_module("cmaes")
    except ImportError as error:
        raise ConfigurationError(
            "`cma-es` needs the library `cmaes`, which is not installed.",
            "`pip install 'lightning_nrl[cmaes]'`, or use `swarm` or `differential-evolution`.",
        ) from error
