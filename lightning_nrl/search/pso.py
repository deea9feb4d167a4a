"""Particle swarm optimisation: a state, and `init`, `ask` and `tell` as pure steps (paper, section II.2).

S independent swarms of P particles over K weights move in one batch, each, bit for bit, as it would alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl.errors import ConfigurationError, check_choice, check_real
from lightning_nrl.search.first_positions import Start, check_start, first_positions, of_origin
from lightning_nrl.search.searcher import SEARCHERS, RandomStreams, SearchOrigin

CHI = 0.7298  # 2 / (phi - 2 + sqrt(phi^2 - 4 phi)) for phi = 4.1 (Clerc & Kennedy 2002)

COEFFICIENTS = {
    "clerc": {"inertia": CHI, "cognitive": CHI * 2.05, "social": CHI * 2.05, "min_speed": 0.0, "max_speed": 0.2},
    "arachne": {"inertia": CHI, "cognitive": CHI * 4.1, "social": CHI * 4.1, "min_speed": 0.2, "max_speed": 5.0},
}
"""The sets of constants; speeds are in ranges of the layer's weights."""


class Swarm(NamedTuple):
    """A particle swarm in mid-flight: S independent swarms of P particles over K weights."""

    position: Tensor  # S x P x K
    velocity: Tensor  # S x P x K
    best_position: Tensor  # S x P x K, each particle's own best
    best_fitness: Tensor  # S x P
    leader: Tensor  # S x K, the best of the whole swarm; the original weights until something is better
    leader_fitness: Tensor  # S
    free: Tensor  # bool, broadcasts to S x P x K: False where nothing ever moves (the elite, padding)
    range: Tensor  # broadcasts to S x P x K, max - min of the layer's weights

    @property
    def candidates(self) -> Tensor:
        return self.position

    @property
    def threshold(self) -> Tensor:
        """`S x P`: what is not a particle's own best changes nothing."""
        return self.best_fitness


@SEARCHERS.register("swarm")
@dataclass(frozen=True)
class ParticleSwarm:
    """The search by particle swarm and its settings. The defaults need no tuning.

    Attributes:
        particles: how many, at least 2.
        iterations: steps at most; 0 only scores the start.
        patience: steps without a better fitness after which the search stops, at least 1.
        start: where the particles begin, all at rest. `local`: one at the original weights, where it stays, the others
            around it. `half`: the same for half of the swarm, the rest drawn from N(mean, std) of the layer's weights.
            `paper`: half exactly at the original weights and free to move, the rest drawn from N(mean, std). `normal`:
            one at the original weights, where it stays, all others drawn from N(mean, std).
        constants: `clerc`: chi = 0.7298, phi_1 = phi_2 = 2.05, random numbers for every weight, no speed above 0.2 of
            the range (max - min) of the layer's weights. `arachne`: phi_1 = phi_2 = 4.1, one random number a particle
            and term, every speed between 0.2 and 5 ranges: that lower limit throws the particles that start at the
            original weights away from them.
        inertia: what a particle keeps of its velocity, at least 0; None, here and below: as `constants` says.
        cognitive: the pull to a particle's own best, at least 0.
        social: the pull to the best of the swarm, at least 0.
        min_speed: no weight moves more slowly, in ranges of the layer's weights, at least 0.
        max_speed: no weight moves faster, likewise, above 0 and at least `min_speed`.
        scale_min: how far from the original the nearest local particle starts, in standard deviations of the layer's
            weights, above 0.
        scale_max: the same for the farthest; those between are spread evenly on a logarithmic scale.
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
            check_real(f"ParticleSwarm.{name}", self._coefficient(name), "number", "give a finite one from 0.", least=0)
        slow, fast = self._coefficient("min_speed"), self._coefficient("max_speed")
        if not slow <= fast or not fast:
            raise ConfigurationError(
                f"`ParticleSwarm.min_speed={slow!r}` does not go with `max_speed={fast!r}`.",
                "give 0 <= min_speed <= max_speed, and max_speed above 0.",
            )

    def _coefficient(self, name: str) -> float:
        given: float | None = getattr(self, name)
        return COEFFICIENTS[self.constants][name] if given is None else given

    @property
    def n_candidates(self) -> int:
        return self.particles

    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Swarm:
        """Places the particles, at rest.

        The first is at the original weights, the next ones at the elites, as many as there is room for on the lines
        from the original through them. Of the others, those that start around the original weights do so around these
        and the elites in turn.
        """
        original, n = origin.original, self.particles
        position = first_positions(origin, streams, n, self.start, self.scale_min, self.scale_max)
        free = torch.arange(n, device=position.device)[:, None] >= (0 if self.start == "paper" else 1)
        if origin.searched is not None:
            free = free & origin.searched
        device = position.device
        lowest, highest = (of_origin(x, origin) for x in (origin.stats.lowest, origin.stats.highest))
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

        v = inertia v + cognitive r_1 (own best - x) + social r_2 (leader - x), x = x + v. In their paper the
        coefficients are chi, chi phi_1 and chi phi_2.
        """
        x = state.position
        _, n, n_weights = x.shape
        inertia, cognitive, social, slow, fast = map(self._coefficient, COEFFICIENTS[self.constants])
        r_own, r_leader = streams.uniform(x, 2, n, n_weights if self.constants == "clerc" else 1)
        to_own, to_leader = state.best_position - x, state.leader[:, None] - x
        velocity = inertia * state.velocity + cognitive * r_own * to_own + social * r_leader * to_leader
        limit = fast * state.range
        if slow:
            velocity = velocity.abs().clamp(slow * state.range, limit).copysign(velocity)
        else:
            velocity = velocity.clamp(-limit, limit)
        velocity = velocity.masked_fill(~state.free, 0.0)
        return state._replace(position=x + velocity, velocity=velocity)

    def tell(self, state: Swarm, fitness: Tensor) -> Swarm:
        """Remembers what was best, `fitness` being `S x P`. NaN counts as worst; among equals the earlier stays."""
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
