"""The twelve settings of the paper's Table II."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_nrl.errors import check_choice
from lightning_nrl.gate import Gate
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.pipeline.options import BoundOptions, SearchOptions, changed_options
from lightning_nrl.search import Fitness, ParticleSwarm


@dataclass(frozen=True)
class PaperRow:
    """One row of Table II of the paper.

    `equation` is the fitness, in which `alpha` is the weight of kept samples. If `perfect_intact`
    (pi) is True, one regression makes the fitness 0. `n_weights` is #lw in the paper, `n_passed` is
    #pos, and `particles` is #p.
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
"""The rows of Table II by their ID in the paper."""


def paper_row(row: str) -> PaperRow:
    """Returns the row of Table II with an ID such as `EXP-A1`.

    Raises:
        ConfigurationError: the ID is unknown.
    """
    check_choice("row", row, TABLE_II)
    return TABLE_II[row]


def paper_arguments(row: str) -> dict[str, Any]:
    """Returns the arguments of `RegressionFreeRepair`, or of `Settings`, for one row of Table II.

    Weights are localised on I_neg and I_pos. Half of the swarm starts exactly at the original
    weights (section II.2), and with pi one regression makes the fitness 0 (section IV.B). The
    strength is 1: the weights become exactly what the swarm finds. The gate is `accuracy`, the
    weaker of the paper's two levels (section III).

    The paper does not say how the swarm moves nor when it stops. Here it moves as in
    `ParticleSwarm`. It stops after 100 iterations, or after 10 without a better fitness, as in
    Arachne (Sohn et al. 2023), on which NeuRecover builds.
    """
    return {
        "method": ParticleSwarm(
            particles=paper_row(row).particles, iterations=100, patience=10, start="paper"
        ),
        "gate": Gate.accuracy(),
        "search": _search_options(row),
        "bounds": BoundOptions(strength=1.0),
    }


def _search_options(row: str) -> SearchOptions:
    paper = paper_row(row)
    fitness = Fitness(
        paper.equation, alpha=paper.alpha, perfect_intact=paper.perfect_intact, infeasible="zero"
    )
    return SearchOptions(fitness, NeuRecoverLite(n_weights=paper.n_weights), paper.n_passed)


def with_paper_row(row: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a row of Table II, overridden by `arguments`.

    In `search` and `bounds`, only options that differ from their defaults override the options of
    the row.
    """
    merged = {**paper_arguments(row), **arguments}
    if "search" in arguments:
        changes = changed_options(arguments["search"])
        merged["search"] = replace(_search_options(row), **changes)
    if "bounds" in arguments:
        changes = changed_options(arguments["bounds"])
        strength = None if "limit" in changes else 1.0
        merged["bounds"] = replace(BoundOptions(strength=strength), **changes)
    return merged
