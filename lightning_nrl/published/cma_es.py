"""CMA-ES (Hansen 2016), from the optional library `cmaes`: `pip install lightning_nrl[cmaes]`.

The library runs on the CPU.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_nrl.errors import ConfigurationError, check_choice, check_real
from lightning_nrl.search.searcher import RandomStream, Searcher, SearchOrigin, check_counts

Covariance = Literal["auto", "full", "diagonal"]
# Largest number of weights for which `auto` is `full`; `default_n_weights` returns fewer.
MAX_FULL = 320


class Evolution(NamedTuple):
    """State of CMA-ES. `CmaEs.tell` changes the object in `strategy` in place."""

    candidates: Tensor  # P x K
    original: Tensor  # K, the weights before the repair
    step: Tensor  # broadcasts to K, standard deviation of the layer's weights: the unit of length
    seed: int
    strategy: Any  # the library's optimiser; None before the first `tell`
    threshold: None = None  # None because the rank of every candidate matters


@dataclass(frozen=True)
class CmaEs(Searcher):
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
        check_counts(self, "population", least=4)
        check_real("CmaEs.sigma", self.sigma, "step", "give a finite number above 0.", above=0)
        check_choice("CmaEs.covariance", self.covariance, get_args(Covariance))
        _library()

    @property
    def n_candidates(self) -> int:
        return self.population

    def init(self, origin: SearchOrigin, random: RandomStream) -> Evolution:
        original, first = origin.original, origin.first_candidates
        step = origin.tensor(origin.stats.std).clamp_min(torch.finfo(original.dtype).tiny)
        drawn = self.sigma * step * random.normal(original, self.population, len(original))
        candidates = torch.cat([first, (original + drawn)[len(first) :]])
        return Evolution(candidates, original, step, random.seed(), None)

    def ask(self, state: Evolution, random: RandomStream) -> Evolution:
        drawn = [torch.from_numpy(state.strategy.ask()) for _ in range(self.population)]
        change = state.step * torch.stack(drawn).to(state.original)
        return state._replace(candidates=state.original + change)

    def tell(self, state: Evolution, fitness: Tensor) -> Evolution:
        """Adapts `strategy` to `fitness`, `P`. The first call creates it."""
        fitness = fitness.double().cpu()
        if state.strategy is None:
            return state._replace(
                strategy=self._strategy(state, state.candidates[int(fitness.argmax())])
            )
        if not bool(fitness.isfinite().any()):
            return state  # the search has ended, or no candidate has a fitness
        points = _in_steps(state, state.candidates)
        # The library minimises and accepts finite numbers only.
        costs = (-fitness).clamp(max=torch.finfo(torch.float64).max).tolist()
        state.strategy.tell(list(zip(points, costs, strict=True)))
        return state

    def _strategy(self, state: Evolution, start: Tensor) -> Any:
        n_weights = len(start)
        # For 1 weight `full` is `diagonal`.
        most_full = {"full": n_weights, "auto": MAX_FULL}.get(self.covariance, 1)
        strategy = _library().CMA if n_weights <= most_full else _library().SepCMA
        return strategy(
            mean=_in_steps(state, start),
            sigma=self.sigma,
            seed=state.seed,
            population_size=self.population,
        )


def _in_steps(state: Evolution, weights: Tensor) -> Any:
    """Returns changes of weights in units of `state.step`, as an array."""
    return ((weights - state.original).double() / state.step.double()).cpu().numpy()


def _library() -> Any:
    try:
        return importlib.import_module("cmaes")
    except ImportError as error:
        raise ConfigurationError(
            "`cma-es` needs the library `cmaes`, which is not installed.",
            "`pip install 'lightning_nrl[cmaes]'`, or use `swarm` or `differential-evolution`.",
        ) from error
