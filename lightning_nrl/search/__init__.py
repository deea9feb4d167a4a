"""Searching values for the localised weights: a fitness, a searcher, and the loop that drives it.

In: the localised weights (`original`), a scorer and how the layer's weights are distributed. Out: a `SearchResult`, the
best candidate and the course of the search. A new algorithm is one file with a `Searcher` in it, registered in
`SEARCHERS`.
"""

from lightning_nrl.search.cma_es import CmaEs
from lightning_nrl.search.differential_evolution import DifferentialEvolution
from lightning_nrl.search.fitness import (
    FITNESSES,
    ArachneDEFitness,
    ArachneFitness,
    Fitness,
    NeuRecoverFitness,
    exchange_rate,
)
from lightning_nrl.search.loop import search, search_many
from lightning_nrl.search.pso import ParticleSwarm, Swarm
from lightning_nrl.search.search_log import SearchHistory, SearchResult
from lightning_nrl.search.searcher import SEARCHERS, RandomStreams, Searcher, SearchOrigin, SearchState, WeightStats

__all__ = [
    "FITNESSES",
    "SEARCHERS",
    "ArachneDEFitness",
    "ArachneFitness",
    "CmaEs",
    "DifferentialEvolution",
    "Fitness",
    "NeuRecoverFitness",
    "ParticleSwarm",
    "RandomStreams",
    "SearchHistory",
    "SearchOrigin",
    "SearchResult",
    "SearchState",
    "Searcher",
    "Swarm",
    "WeightStats",
    "exchange_rate",
    "search",
    "search_many",
]
