"""Searching values for the localised weights: one searcher a file, every one ends in a `SearchResult`."""

from __future__ import annotations

from lightning_nrl.search.pso import ParticleSwarm, Swarm, ask, start, tell
from lightning_nrl.search.result import SearchHistory, SearchResult
from lightning_nrl.search.spread import Spread
from lightning_nrl.search.streams import Streams
from lightning_nrl.search.swarm import search, search_many

__all__ = [
    "ParticleSwarm",
    "SearchHistory",
    "SearchResult",
    "Spread",
    "Streams",
    "Swarm",
    "ask",
    "search",
    "search_many",
    "start",
    "tell",
]
