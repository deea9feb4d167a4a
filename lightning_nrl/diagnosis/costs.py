"""What each method would take, from the time that the model itself takes."""

from __future__ import annotations

from typing import NamedTuple

from lightning_nrl.diagnosis.diagnosis import Cost
from lightning_nrl.search import ParticleSwarm

__all__ = ["Pace", "costs"]

EPOCHS = 40
"""Of a training that goes on, where the model does not say how long it was trained: a usual length."""

STEP = 2.5
"""A step of training in forward passes: one forward and one or two as dear backward."""

POLISH_PASSES = 30
"""Passes over the known data that a polish makes, forward and backward ones in forwards: 3 to 8 rounds in trials."""

LINEAR_PASSES = 40
"""Passes over the known data of a linearised search, in forwards."""

CONVEX_SOLVES = 4.0
"""A convex search takes as long as so many looks at every target alone."""

SCORED = 0.15
"""Share of all scores that a swarm really computes: fragile samples first, and most candidates are given up early."""


class Pace(NamedTuple):
    """Seconds that were measured."""

    forward: float  # a sample, evaluated
    head: float | None  # a sample, the last Linear alone; None where there is none
    alone: float | None  # every target alone; None if that was not looked at
    samples: int  # known ones


def costs(pace: Pace, epochs: int | None = None) -> tuple[Cost, ...]:
    """A line for each method, the quickest first.

    Args:
        pace: what was measured.
        epochs: how many epochs the model was trained for, if that is known.
    """
    look = pace.forward * pace.samples
    swarm, n = ParticleSwarm(), f"{pace.samples:,} samples"
    candidates = swarm.particles * swarm.iterations
    found = []
    if pace.alone is not None:
        found.append(Cost("convex", 2 * look + CONVEX_SOLVES * pace.alone, f"2 passes over {n}, and the programmes"))
    if pace.head is not None:
        scores = SCORED * candidates * pace.samples * pace.head
        found.append(
            Cost("swarm", 3 * look + scores, f"3 passes over {n}, {candidates:,} candidates of the last layer")
        )
    found.append(Cost("linearised", LINEAR_PASSES * look, f"about {LINEAR_PASSES} passes over {n}"))
    length, known = epochs or EPOCHS, "as in training" if epochs else "if trained so long"
    fit = length * STEP * look + POLISH_PASSES * look
    found.append(Cost("constrained", fit, f"{length} epochs ({known}) over {n}, and a polish; less with `max_time`"))
    return tuple(sorted(found, key=lambda cost: cost.seconds))
