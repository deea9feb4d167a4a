"""Table II of the paper: the settings of its twelve experiments."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_nrl.errors import ConfigurationError, explain
from lightning_nrl.gate import Gate
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.pipeline.settings import BoundOptions, SearchOptions, changed_options
from lightning_nrl.search import ParticleSwarm
from lightning_nrl.search.fitness import Fitness

__all__ = ["TABLE_II", "PaperRow", "paper_arguments", "paper_row", "with_paper_row"]


@dataclass(frozen=True)
class PaperRow:
    """One row of Table II: the equation of the fitness, its intact weight, whether a regression makes it 0 (pi).

    Then the numbers of localised weights (#lw), of sampled passed samples (#pos) and of particles (#p).
    """

    equation: Literal["eq1", "eq2"]
    alpha: float
    perfect_intact: bool
    n_weights: int
    n_passed: int
    particles: int


TABLE_II: dict[str, PaperRow] = {
    "EXP-A1": PaperRow("eq1", 6, False, 309, 500, 100),
    "EXP-B1": PaperRow("eq1", 6, False, 282, 500, 200),
    "EXP-C1": PaperRow("eq2", 8, True, 32, 500, 200),
    "EXP-A2": PaperRow("eq1", 6, False, 309, 500, 200),
    "EXP-A3": PaperRow("eq1", 5, False, 309, 500, 200),
    "EXP-A4": PaperRow("eq1", 4, False, 309, 500, 200),
    "EXP-B2": PaperRow("eq1", 5, False, 282, 500, 200),
    "EXP-B3": PaperRow("eq1", 4, False, 282, 500, 200),
    "EXP-B4": PaperRow("eq1", 6, False, 282, 1000, 200),
    "EXP-C2": PaperRow("eq2", 8, True, 76, 500, 200),
    "EXP-C3": PaperRow("eq2", 8, True, 53, 500, 200),
    "EXP-C4": PaperRow("eq2", 8, True, 16, 500, 200),
}
"""By the paper's ID."""


def paper_row(row: str) -> PaperRow:
    """The row with this ID.

    Raises:
        ConfigurationError: Table II has no such row; the nearest names are given.
    """
    if row not in TABLE_II:
        near = difflib.get_close_matches(str(row).upper(), TABLE_II, n=3, cutoff=0.3) or list(TABLE_II)
        raise ConfigurationError(explain(f"`row={row!r}` is not in Table II.", f"the nearest rows are {near}."))
    return TABLE_II[row]


def paper_arguments(row: str) -> dict[str, Any]:
    """Arguments of `RegressionFreeRepair`, and of `Settings`, for one row of Table II.

    Weights are localised on I_neg and I_pos. Half of the swarm starts exactly at the original weights (section II.2),
    and under pi a regression makes the fitness 0 (section IV.B). What is found is taken as it is. The gate is
    `accuracy`, the paper's weaker level (section III).

    The paper does not say how the swarm moves nor when it stops. The steps are those of `ParticleSwarm`; it stops after
    100 iterations, or 10 without a better fitness, as Arachne's does (Sohn et al. 2023), on which NeuRecover builds.
    """
    found = paper_row(row)
    fitness = Fitness(found.equation, alpha=found.alpha, perfect_intact=found.perfect_intact, infeasible="zero")
    return {
        "method": ParticleSwarm(particles=found.particles, iterations=100, patience=10, start="paper"),
        "gate": Gate.accuracy(),
        "search": SearchOptions(fitness, NeuRecoverLite(n_weights=found.n_weights), found.n_passed),
        "bounds": BoundOptions(strength=1.0),
    }


def with_paper_row(row: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A row's arguments with some more, which go before it; of options, those that differ from the defaults do."""
    made = {**paper_arguments(row), **arguments}
    search, bounds = (paper_arguments(row)[name] for name in ("search", "bounds"))
    if "search" in arguments:
        made["search"] = replace(search, **changed_options(arguments["search"]))
    if "bounds" in arguments:
        own = changed_options(arguments["bounds"])
        made["bounds"] = replace(bounds, **({"strength": None} if "limit" in own else {}), **own)
    return made
