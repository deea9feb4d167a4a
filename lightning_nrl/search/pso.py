"""Particle swarm optimisation (paper, section II.2).

S independent swarms run in one batch. A swarm gives bit for bit the same result in a batch and
alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl.errors import ConfigurationError, check_choice, check_real
from lightning_nrl.search.first_positions import Start, broadcast_stat, check_start, first_positions
from lightning_nrl.search.searcher import SEARCHERS, RandomStreams, SearchOrigin

CHI = 0.7298  # 2 / (phi - 2 + sqrt(phi^2 - 4 phi)) for phi = 4.1 (Clerc & Kennedy 2002)

COEFFICIENTS = {
    "clerc": {
        "inertia": CHI,
        "cognitive": CHI * 2.05,
        "social": CHI * 2.05,
        "min_speed": 0.0,
        "max_speed": 0.2,
    },
    "arachne": {
        "inertia": CHI,
        "cognitive": CHI * 4.1,
        "social": CHI * 4.1,
        "min_speed": 0.2,
        "max_speed": 5.0,
    },
}
"""Coefficients by the value of `ParticleSwarm.constants`; speeds are multiples of the range of the
layer's weights.
"""


class Swarm(NamedTuple):
    """State of S independent swarms of P particles over K weights."""

    position: Tensor  # S x P x K
    velocity: Tensor  # S x P x K
    best_position: Tensor  # S x P x K, best position of each particle so far
    best_fitness: Tensor  # S x P, fitness of the best positions
    leader: Tensor  # S x K, best position of the swarm so far; initially the original weights
    leader_fitness: Tensor  # S, fitness of the leaders
    free: Tensor  # bool, broadcasts to S x P x K, False where a weight must not move (the first particle, padding)
    range: Tensor  # broadcasts to S x P x K, max - min of the layer's weights

    @property
    def candidates(self) -> Tensor:
        return self.position

    @property
    def threshold(self) -> Tensor:
        """Best fitness of each particle so far, `S x P`. A particle must exceed this to change any
        best position.
        """
        return self.best_fitness


@SEARCHERS.register("swarm")
@dataclass(frozen=True)
class ParticleSwarm:
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
        check_start(self, particles=2)
        check_choice("ParticleSwarm.constants", self.constants, tuple(COEFFICIENTS))
        for name in COEFFICIENTS[self.constants]:
            check_real(
                f"ParticleSwarm.{name}",
                self._coefficient(name),
                "number",
                "give a finite number >= 0.",
                least=0,
            )
        slow, fast = self._coefficient("min_speed"), self._coefficient("max_speed")
        if not slow <= fast or not fast:
            raise ConfigurationError(
                f"`ParticleSwarm.min_speed={slow!r}` and `max_speed={fast!r}` are not a range.",
                "give 0 <= min_speed <= max_speed, and max_speed above 0.",
            )

    def _coefficient(self, name: str) -> float:
        given: float | None = getattr(self, name)
        return COEFFICIENTS[self.constants][name] if given is None else given

    @property
    def n_candidates(self) -> int:
        return self.particles

    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Swarm:
        original, n = origin.original, self.particles
        position = first_positions(origin, streams, n, self.start, self.scale_min, self.scale_max)
        free = torch.arange(n, device=position.device)[:, None] >= (
            0 if self.start == "paper" else 1
        )
        if origin.searched is not None:
            free = free & origin.searched
        device = position.device
        lowest, highest = (
            broadcast_stat(x, origin) for x in (origin.stats.lowest, origin.stats.highest)
        )
        worst = torch.full(position.shape[:2], -math.inf, dtype=widest(device), device=device)
        return Swarm(
            position=position,
            velocity=torch.zeros_like(position),
            best_position=position,
            best_fitness=worst,
            leader=original,
            leader_fitness=worst[:, 0],
            free=free,
            range=highest - lowest,
        )

    def ask(self, state: Swarm, streams: RandomStreams) -> Swarm:
        """Moves every particle one step (Clerc & Kennedy 2002, eq. 4.1).

        v = inertia v + cognitive r_1 (particle's best - x) + social r_2 (swarm's best - x), with
        random numbers r_1 and r_2 from [0, 1). The speed is limited (`min_speed`, `max_speed`).
        Then x = x + v.
        """
        x = state.position
        _, n, n_weights = x.shape
        inertia, cognitive, social, slow, fast = map(
            self._coefficient, COEFFICIENTS[self.constants]
        )
        r_own, r_leader = streams.uniform(x, 2, n, n_weights if self.constants == "clerc" else 1)
        to_own, to_leader = state.best_position - x, state.leader[:, None] - x
        velocity = (
            inertia * state.velocity + cognitive * r_own * to_own + social * r_leader * to_leader
        )
        limit = fast * state.range
        if slow:
            velocity = velocity.abs().clamp(slow * state.range, limit).copysign(velocity)
        else:
            velocity = velocity.clamp(-limit, limit)
        velocity = velocity.masked_fill(~state.free, 0.0)
        return state._replace(position=x + velocity, velocity=velocity)

    def tell(self, state: Swarm, fitness: Tensor) -> Swarm:
        """Updates the best positions by `fitness`, `S x P`. NaN ranks last. On a tie the earlier
        position stays.
        """
        fitness = fitness.to(state.best_fitness.dtype)
        fitness = fitness.masked_fill(fitness.isnan(), -math.inf)
        better = fitness > state.best_fitness
        top, which = fitness.max(1)
        leads = top > state.leader_fitness
        candidate = state.position.take_along_dim(which[:, None, None], 1)[:, 0]
        return state._replace(
            best_position=torch.where(better[..., None], state.position, state.best_position),
            best_fitness=torch.where(better, fitness, state.best_fitness),
            leader=torch.where(leads[:, None], candidate, state.leader),
            leader_fitness=torch.where(leads, top, state.leader_fitness),
        )
