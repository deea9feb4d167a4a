"""Particle swarm optimisation (paper, section II.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl.errors import ConfigurationError, check_choice, check_real
from lightning_nrl.search.first_positions import Start, check_start, first_positions
from lightning_nrl.search.searcher import (
    SEARCHERS,
    RandomStream,
    Searcher,
    SearchOrigin,
    check_counts,
)

CHI = 0.7298  # 2 / (phi - 2 + sqrt(phi^2 - 4 phi)) for phi = 4.1 (Clerc & Kennedy 2002)


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of a step; speeds are multiples of the range of the layer's weights."""

    inertia: float
    cognitive: float
    social: float
    min_speed: float
    max_speed: float


COEFFICIENTS = {
    "clerc": Coefficients(CHI, 2.05 * CHI, 2.05 * CHI, min_speed=0.0, max_speed=0.2),
    "arachne": Coefficients(CHI, 4.1 * CHI, 4.1 * CHI, min_speed=0.2, max_speed=5.0),
}
"""Coefficients by the value of `ParticleSwarm.constants`."""


class Swarm(NamedTuple):
    """State of a swarm of P particles over K weights."""

    position: Tensor  # P x K
    velocity: Tensor  # P x K
    best_position: Tensor  # P x K, best position of each particle so far
    best_fitness: Tensor  # P, fitness of the best positions
    leader: Tensor  # K, best position of the swarm so far; initially the original weights
    leader_fitness: Tensor  # 1, fitness of the leader
    free: Tensor  # P x 1 bool, False for a particle that must not move
    range: Tensor  # broadcasts to P x K, max - min of the layer's weights

    @property
    def candidates(self) -> Tensor:
        return self.position

    @property
    def threshold(self) -> Tensor:
        """Best fitness of each particle so far, `P`.

        A particle must exceed this to change any best position.
        """
        return self.best_fitness


@SEARCHERS.register("swarm")
@dataclass(frozen=True)
class ParticleSwarm(Searcher):
    """Search by particle swarm optimisation. The defaults need no tuning.

    Attributes:
        particles: number of particles, at least 2.
        iterations: maximum number of steps; with 0 only the initial positions are scored.
        patience: steps without improvement before the search stops, at least 1.
        start: initial positions. Initial velocities are 0. Some particles are drawn from N, the
            normal distribution with mean and standard deviation of the layer's weights. `local`:
            one particle stays at the original weights and the others start around it. `half`: half
            of the swarm starts as in `local`, the rest is drawn from N. `paper`: half of the swarm
            starts exactly at the original weights and may move, the rest is drawn from N. `normal`:
            one particle stays at the original weights, the rest is drawn from N.
        constants: default coefficients. `clerc`: `inertia` is chi = 0.7298, `cognitive` and
            `social` are 2.05 chi, each weight has its own random factor per pull, and the speed is
            at most 0.2 of the range (max - min) of the layer's weights. `arachne`: `inertia` is
            chi, `cognitive` and `social` are 4.1 chi, each particle has one random factor per pull,
            and the speed is from 0.2 to 5 ranges. This minimum speed drives particles away from the
            original weights.
        inertia: coefficient of the velocity, at least 0. If this or one of the next four is None,
            see `constants`.
        cognitive: coefficient of the pull to the particle's best position, at least 0.
        social: coefficient of the pull to the swarm's best position, at least 0.
        min_speed: minimum speed of each weight, as a multiple of the range of the layer's weights,
            at least 0.
        max_speed: maximum speed of each weight in the same unit, above 0 and at least `min_speed`.
        scale_min: in `local` and `half`, initial distance of the nearest particle from the original
            weights, in standard deviations of the layer's weights, above 0.
        scale_max: the same distance, but of the farthest particle. The other distances are spaced
            logarithmically.
    """

    particles: int = 100
    iterations: int = 300
    patience: int = 50
    start: Start = "local"
    constants: Literal["clerc", "arachne"] = "clerc"
    scale_min: float = 0.003
    scale_max: float = 0.3
    inertia: float | None = None
    cognitive: float | None = None
    social: float | None = None
    min_speed: float | None = None
    max_speed: float | None = None

    def __post_init__(self) -> None:
        check_counts(self, "particles", least=2)
        check_start(type(self).__name__, self.start, self.scale_min, self.scale_max)
        check_choice("ParticleSwarm.constants", self.constants, COEFFICIENTS)
        for name, value in vars(self.coefficients).items():
            check_real(
                f"ParticleSwarm.{name}", value, "number", "give a finite number >= 0.", least=0
            )
        slow, fast = self.coefficients.min_speed, self.coefficients.max_speed
        if not slow <= fast or not fast:
            raise ConfigurationError(
                f"`ParticleSwarm.min_speed={slow!r}` and `max_speed={fast!r}` are not a range.",
                "give 0 <= min_speed <= max_speed, and max_speed above 0.",
            )

    @property
    def coefficients(self) -> Coefficients:
        """The coefficients of this swarm, with defaults from `constants`."""
        coefficients = vars(COEFFICIENTS[self.constants])
        for name in coefficients:
            value = vars(self)[name]
            if value is not None:
                coefficients = {**coefficients, name: value}
        return Coefficients(**coefficients)

    @property
    def n_candidates(self) -> int:
        return self.particles

    def init(self, origin: SearchOrigin, random: RandomStream) -> Swarm:
        n = self.particles
        position = first_positions(origin, random, n, self.start, self.scale_min, self.scale_max)
        device = position.device
        n_fixed = 0 if self.start == "paper" else 1
        worst = torch.full((n,), -math.inf, dtype=widest(device), device=device)
        return Swarm(
            position=position,
            velocity=torch.zeros_like(position),
            best_position=position,
            best_fitness=worst,
            leader=origin.original,
            leader_fitness=worst[:1],
            free=torch.arange(n, device=device)[:, None] >= n_fixed,
            range=origin.tensor(origin.stats.highest) - origin.tensor(origin.stats.lowest),
        )

    def ask(self, state: Swarm, random: RandomStream) -> Swarm:
        """Moves every particle one step (Clerc & Kennedy 2002, eq. 4.1).

        v = inertia v + cognitive r_1 (particle's best - x) + social r_2 (swarm's best - x), with
        random numbers r_1 and r_2 from [0, 1). The speed is limited (`min_speed`, `max_speed`).
        Then x = x + v.
        """
        x, step = state.position, self.coefficients
        n, n_weights = x.shape
        n_factors = n_weights if self.constants == "clerc" else 1
        r_1, r_2 = random.uniform(x, 2, n, n_factors)
        velocity = (
            step.inertia * state.velocity
            + step.cognitive * r_1 * (state.best_position - x)
            + step.social * r_2 * (state.leader - x)
        )
        limit = step.max_speed * state.range
        if step.min_speed:
            velocity = velocity.abs().clamp(step.min_speed * state.range, limit).copysign(velocity)
        else:
            velocity = velocity.clamp(-limit, limit)
        velocity = velocity.masked_fill(~state.free, 0.0)
        return state._replace(position=x + velocity, velocity=velocity)

    def tell(self, state: Swarm, fitness: Tensor) -> Swarm:
        """Updates the best positions by `fitness`, `P`. On a tie the earlier position stays."""
        better = fitness > state.best_fitness
        top, leader = fitness.max(0, keepdim=True)
        leads = top > state.leader_fitness
        candidate = state.position.index_select(0, leader)[0]
        return state._replace(
            best_position=torch.where(better[:, None], state.position, state.best_position),
            best_fitness=torch.where(better, fitness, state.best_fitness),
            leader=torch.where(leads, candidate, state.leader),
            leader_fitness=torch.where(leads, top, state.leader_fitness),
        )
