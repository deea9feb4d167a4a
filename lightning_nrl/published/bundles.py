"""Published methods that localise and search, with replaceable localiser, fitness and searcher.

docs/published_methods.md says how they differ from the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning_nrl.errors import check_choice
from lightning_nrl.localization import Localizer, NeuRecoverLite
from lightning_nrl.methods import LocalSearch
from lightning_nrl.published.arachne import Arachne, ArachneV2
from lightning_nrl.published.differential_evolution import DifferentialEvolution
from lightning_nrl.published.fitnesses import ArachneDEFitness, ArachneFitness, NeuRecoverFitness
from lightning_nrl.published.neurecover import NeuRecover
from lightning_nrl.search import Fitness, FitnessFunction, ParticleSwarm, Searcher

ITERATIONS = 100  # as published
PATIENCE = 10  # as published


def neurecover_lite() -> LocalSearch:
    """Returns NeuRecoverLite (Nakagawa et al. 2025)."""
    swarm = ParticleSwarm(iterations=ITERATIONS, patience=PATIENCE, start="paper")
    return LocalSearch(swarm, localizer=NeuRecoverLite(), fitness=Fitness("eq1"))


def neurecover() -> LocalSearch:
    """Returns NeuRecover (Tokui et al. 2022)."""
    return LocalSearch(_arachne_swarm(), localizer=NeuRecover(), fitness=NeuRecoverFitness())


def arachne() -> LocalSearch:
    """Returns Arachne (Sohn et al. 2023)."""
    return LocalSearch(_arachne_swarm(), localizer=Arachne(), fitness=ArachneFitness())


def arachne_de() -> LocalSearch:
    """Returns the second version of Arachne, with differential evolution."""
    evolution = DifferentialEvolution(iterations=ITERATIONS, patience=PATIENCE, start="normal")
    return LocalSearch(evolution, localizer=ArachneV2(), fitness=ArachneDEFitness())


def _arachne_swarm() -> ParticleSwarm:
    return ParticleSwarm(
        iterations=ITERATIONS, patience=PATIENCE, start="normal", constants="arachne"
    )


BUNDLES: Mapping[str, Callable[[], LocalSearch]] = {
    "neurecover-lite": neurecover_lite,
    "neurecover": neurecover,
    "arachne": arachne,
    "arachne-de": arachne_de,
}
"""The published methods by name, with their published settings."""


def bundle(
    name: str,
    *,
    localizer: str | Localizer | None = None,
    fitness: str | FitnessFunction | None = None,
    searcher: str | Searcher | None = None,
) -> LocalSearch:
    """Returns a published method with other parts, given by name or as objects.

    None keeps the method's own part.

    Raises:
        ConfigurationError: there is no such method or part.

    Example:
        >>> bundle("arachne", localizer="random").localizer
        RandomWeights(n_weights=None, seed=0, include_bias=False)
    """
    check_choice("name", name, BUNDLES)
    return BUNDLES[name]().with_parts(localizer=localizer, fitness=fitness, searcher=searcher)
