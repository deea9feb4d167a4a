"""What each method would take, from the time that the model itself takes."""

from __future__ import annotations

from typing import NamedTuple

from lightning_nrl.analysis.diagnosis.diagnosis_result import Cost
from lightning_nrl.pipeline.strength import PATH_STRENGTHS
from lightning_nrl.problem.budget import (
    CONVEX_SOLVES,
    LADDER_SEARCHES,
    LINEARIZED_PASSES,
    PASSES_PER_VISIT,
    POLISH_PASSES,
    SCORED_SHARE,
    VISITS_PER_SAMPLE,
)
from lightning_nrl.search import ParticleSwarm

__all__ = ["Timings", "costs"]

PASSES_AROUND_SEARCH = 4 + len(PATH_STRENGTHS)
"""Passes over the known data that any repair makes around its search: to collect, to record or localise, to count what
was found twice, and to count it at several strengths."""


class Timings(NamedTuple):
    """Seconds that were measured."""

    one_pass: float  # of the model over all known samples, by all ranks together
    head: float | None  # of the last Linear over all known samples; None where there is none
    alone: float | None  # a look at every target alone; None if that could not be done
    margins: bool  # whether the task has any: without them nothing can be done but swarm


def costs(pace: Timings, epochs: int | None = None) -> tuple[Cost, ...]:
    """A line for each method that can be used, the quickest first; without `epochs` training cannot go on."""
    around, swarm = PASSES_AROUND_SEARCH * pace.one_pass, ParticleSwarm()
    candidates = swarm.particles * swarm.iterations
    search = None if pace.head is None else SCORED_SHARE * candidates * pace.head
    found = []
    if search is not None:
        how = f"at most {candidates:,} candidates for the last Linear"
        found.append(Cost("swarm", around + search, how))
        if not pace.margins:
            found.append(Cost("auto", around + search, f"{how}; nothing else works without margins"))
    if pace.margins:
        if pace.alone is not None:
            found.append(Cost("convex", around + CONVEX_SOLVES * pace.alone, "exact programmes for the last Linear"))
        found.append(Cost("linearized", around + LINEARIZED_PASSES * pace.one_pass, "some steps of one layer"))
        fit = (epochs or VISITS_PER_SAMPLE) * PASSES_PER_VISIT * pace.one_pass + POLISH_PASSES * pace.one_pass
        how = f"{epochs} more epochs of training" if epochs else f"a fit of {VISITS_PER_SAMPLE} epochs"
        found.append(Cost("finetune-polish", around + fit, f"{how}, then a polish"))
        layer = LADDER_SEARCHES * (search or 0.0) + CONVEX_SOLVES * (pace.alone or 0.0)
        found.append(Cost("auto", around + fit + layer, f"searches of the layer, {how}, then a polish"))
    return tuple(sorted(found, key=lambda cost: cost.seconds))
