"""What to repair and how: the one value that the shells hand to the core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_nrl.fitness import Fitness
from lightning_nrl.gate import Gate
from lightning_nrl.localization import Localizer, NeuRecoverLite
from lightning_nrl.search import ParticleSwarm
from lightning_nrl.targets import AllFailures, Target

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What to repair and how. The defaults are the strongest regression-free setting there is.

    Attributes:
        target: which failures are to be repaired.
        layer: dotted name of the layer, several names, or `auto`: the last Linear.
        gate: what a repair must satisfy to be accepted.
        method: how new weights are searched.
        fitness: how candidates are ranked.
        localizer: how the weights to be searched are chosen.
        n_passed: how many passed samples are scored in the search (#pos), drawn from the sources marked `passed`; None
            scores every known passed sample.
        seed: of the sample and of the search.
        budget: bytes that scoring may use on the device; None takes a share of what is free.
    """

    target: Target = field(default_factory=AllFailures)
    layer: str | Sequence[str] = "auto"
    gate: Gate = field(default_factory=Gate.instance)
    method: ParticleSwarm = field(default_factory=ParticleSwarm)
    fitness: Fitness = field(default_factory=Fitness)
    localizer: Localizer = field(default_factory=NeuRecoverLite)
    n_passed: int | None = None
    seed: int = 0
    budget: int | None = None
