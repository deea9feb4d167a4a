"""Searching values for the localised weights: a fitness, a searcher, and the loop that drives it.

In: a localisation and a scorer. Out: a `SearchResult`, the best candidate and the course of the search.
"""

from lightning_nrl.search.fitness import Fitness, exchange_rate
from lightning_nrl.search.init_stats import WeightStats
from lightning_nrl.search.loop import search, search_many
from lightning_nrl.search.pso import ParticleSwarm, Swarm, ask, start, tell
from lightning_nrl.search.rng import RandomStreams
from lightning_nrl.search.search_result import SearchHistory, SearchResult

__all__ = [
    "Fitness",
    "ParticleSwarm",
    "RandomStreams",
    "SearchHistory",
    "SearchResult",
    "Swarm",
    "WeightStats",
    "ask",
    "exchange_rate",
    "search",
    "search_many",
    "start",
    "tell",
]
