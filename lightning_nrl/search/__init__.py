"""Search for new values of the localised weights: fitnesses, searchers and the loop that runs them.

A candidate is one set of values for the localised weights. In: the original weights, a scorer, and
statistics of the layer's weights. Out: a `SearchResult`. To add an algorithm, write a `Searcher`
and register it in `SEARCHERS`.
"""

from lightning_nrl.search.fitness import FITNESSES, Fitness, FitnessFunction, exchange_rate
from lightning_nrl.search.loop import search
from lightning_nrl.search.pso import ParticleSwarm, Swarm
from lightning_nrl.search.search_log import SearchHistory, SearchResult
from lightning_nrl.search.searcher import (
    SEARCHERS,
    RandomStream,
    Searcher,
    SearchOrigin,
    SearchState,
    WeightStats,
)

__all__ = [
    "FITNESSES",
    "SEARCHERS",
    "Fitness",
    "FitnessFunction",
    "ParticleSwarm",
    "RandomStream",
    "SearchHistory",
    "SearchOrigin",
    "SearchResult",
    "SearchState",
    "Searcher",
    "Swarm",
    "WeightStats",
    "exchange_rate",
    "search",
]
