"""CMA-ES (Hansen 2016), from the optional library `cmaes`: `pip install lightning_nrl[cmaes]`.

The library runs on the CPU, one search at a time. The candidates of all searches are still scored
in one call.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError, check_choice, check_real
from lightning_nrl.search.first_positions import broadcast_stat
from lightning_nrl.search.searcher import RandomStreams, SearchOrigin, check_numbers

Covariance = Literal["auto", "full", "diagonal"]
MAX_FULL = (
    320  # largest number of weights for which `auto` is `full`; `default_n_weights` returns fewer
)


class Evolution(NamedTuple):
    """State of S independent searches by CMA-ES. `CmaEs.tell` changes the objects in `strategies`
    in place.
    """

    candidates: Tensor  # S x P x K: searches x candidates x weights
    original: Tensor  # S x K, the weights before the repair
    step: Tensor  # S x K, standard deviation of the layer's weights: the library's unit of length
    seeds: tuple[int, ...]  # one per search
    strategies: (
        tuple[Any, ...] | None
    )  # the library's optimisers, one per search; None before the first `tell`
    sizes: tuple[int, ...]  # number of weights of each search, without padding
    threshold: None = None  # None because the rank of every candidate matters


@dataclass(frozen=True)
class CmaEs:
    """Search by covariance matrix adaptation.

    The first candidates are the original weights, the elites (known good candidates), and random
    points around the original weights. The search starts at the best of these. Its result is the
    best candidate of all generations, which is never worse than the original weights.

    Attributes:
        population: candidates per generation, at least 4.
        iterations: maximum number of generations; with 0 only the first candidates are scored.
        patience: generations without improvement before the search stops, at least 1.
        sigma: initial step size in standard deviations of the layer's weights, above 0.
        covariance: `full` needs memory quadratic and time cubic in the number of weights.
            `diagonal` is sep-CMA-ES (Ros & Hansen 2008). `auto` is `full` for up to 320 weights and
            `diagonal` for more.
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
        original, first = origin.original, origin.first_candidates
        step = broadcast_stat(origin.stats.std, origin).clamp_min(torch.finfo(original.dtype).tiny)
        drawn = (
            self.sigma
            * step
            * streams.normal(original[:, None], self.population, original.shape[1])
        )
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
        """Adapts `strategies` to `fitness`, `S x P`. The first call creates the strategies. NaN
        ranks last.
        """
        worth = fitness.double().cpu()
        worth = worth.masked_fill(worth.isnan(), -math.inf)
        if state.strategies is None:
            best = state.candidates.take_along_dim(
                worth.argmax(1).to(state.candidates.device)[:, None, None], 1
            )[:, 0]
            return state._replace(
                strategies=tuple(self._strategy(state, s, best[s]) for s in range(len(best)))
            )
        for s, strategy in enumerate(state.strategies):
            if not bool(worth[s].isfinite().any()):
                continue  # the search has ended, or no candidate has a fitness
            own = slice(state.sizes[s])
            points = self._units(state, s, state.candidates[s, :, own]).numpy()
            # The library minimises and accepts finite numbers only.
            costs = (-worth[s]).clamp(max=torch.finfo(torch.float64).max).tolist()
            strategy.tell(list(zip(points, costs, strict=True)))
        return state

    def _strategy(self, state: Evolution, s: int, start: Tensor) -> Any:
        n_weights = state.sizes[s]
        limit = {"full": n_weights, "auto": MAX_FULL}.get(
            self.covariance, 1
        )  # for 1 weight `full` is `diagonal`
        strategy = _library().CMA if n_weights <= limit else _library().SepCMA
        mean = self._units(state, s, start[:n_weights]).numpy()
        return strategy(
            mean=mean, sigma=self.sigma, seed=state.seeds[s], population_size=self.population
        )

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
