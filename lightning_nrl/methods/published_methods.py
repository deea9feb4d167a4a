"""Published methods that localise and search. The localiser, fitness and searcher of each method can be replaced.

docs/published_methods.md has their equations and the differences from the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning_nrl.errors import check_choice
from lightning_nrl.localization import Arachne, ArachneV2, Localizer, NeuRecover, NeuRecoverLite
from lightning_nrl.methods.local_search import LocalSearch
from lightning_nrl.search import (
    ArachneDEFitness,
    ArachneFitness,
    DifferentialEvolution,
    Fitness,
    NeuRecoverFitness,
    ParticleSwarm,
    Searcher,
)
from lightning_nrl.search.fitness import FitnessFunction

AS_PUBLISHED: dict[str, Any] = {"iterations": 100, "patience": 10}
_paper_swarm = partial(ParticleSwarm, **AS_PUBLISHED, start="paper")
_arachne_swarm = partial(ParticleSwarm, **AS_PUBLISHED, start="normal", constants="arachne")
_evolution = partial(DifferentialEvolution, **AS_PUBLISHED, start="normal")

BUNDLES: Mapping[str, Callable[[], LocalSearch]] = {
    "neurecover-lite": lambda: LocalSearch(_paper_swarm(), localizer=NeuRecoverLite(), fitness=Fitness("eq1")),
    "neurecover": lambda: LocalSearch(_arachne_swarm(), localizer=NeuRecover(), fitness=NeuRecoverFitness()),
    "arachne": lambda: LocalSearch(_arachne_swarm(), localizer=Arachne(), fitness=ArachneFitness()),
    "arachne-de": lambda: LocalSearch(_evolution(), localizer=ArachneV2(), fitness=ArachneDEFitness()),
}
"""The published methods by name, with their published settings."""


def bundle(
    name: str,
    *,
    localizer: str | Localizer | None = None,
    fitness: str | FitnessFunction | None = None,
    searcher: str | Searcher[Any] | None = None,
) -> LocalSearch:
    """Returns a published method with other parts, given by name or as objects. None keeps the method's own part.

    Raises:
        ConfigurationError: there is no such method or part.

    Example:
        >>> bundle("arachne", localizer="random").localizer
        RandomWeights(n_weights=None, seed=0, include_bias=False)
    """
    check_choice("name", name, tuple(BUNDLES))
    return BUNDLES[name]().with_parts(localizer=localizer, fitness=fitness, searcher=searcher)
