"""Differential evolution, rand/1/bin (Storn & Price 1997), as used by Arachne's second version."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl.errors import ConfigurationError, check_real
from lightning_nrl.search.first_positions import Start, broadcast_stat, check_start, first_positions
from lightning_nrl.search.searcher import RandomStreams, SearchOrigin


class Population(NamedTuple):
    """State of differential evolution: S independent populations of P members over K weights."""

    members: Tensor  # S x P x K
    fitness: Tensor  # S x P, minus infinity before the first candidates are scored
    candidates: Tensor  # S x P x K, the trial of each member (see `DifferentialEvolution`)
    lowest: Tensor  # broadcasts to S x P x K, lower bound of the weights
    highest: Tensor  # broadcasts to S x P x K, upper bound of the weights
    searched: Tensor | None  # S x 1 x K bool, False at padding; None: no padding

    @property
    def threshold(self) -> Tensor:
        """Largest number below each member's fitness, `S x P`, since a trial of equal fitness
        replaces its member.
        """
        return torch.nextafter(self.fitness, torch.full_like(self.fitness, -math.inf))


@dataclass(frozen=True)
class DifferentialEvolution:
    """Search by differential evolution, rand/1/bin.

    In each generation every member x gets a trial, a candidate that replaces x if it is at least as
    good. Each weight of the trial comes from `x_a + F (x_b - x_c)` with probability `crossover`,
    and otherwise from x, but at least one weight does not come from x. The members a, b and c are
    drawn for each x, and F is drawn once per generation. Member 0 starts at the original weights.

    Attributes:
        population: number of members, at least 4.
        iterations: maximum number of generations; with 0 only the first members are scored.
        patience: generations without improvement before the search stops, at least 1.
        start: initial members, as in `ParticleSwarm`.
        scale_min: as in `ParticleSwarm`.
        scale_max: as in `ParticleSwarm`.
        crossover: crossover rate CR, from 0 to 1.
        factor_min: smallest value of F, at least 0; F has a uniform distribution.
        factor_max: largest value of F, at least `factor_min`.
        reach: trials are clipped to the range of the layer's weights. A negative lower end and a
            positive upper end of this range are first multiplied by `reach`, at least 1.
    """

    label: ClassVar[str] = "differential evolution"
    population: int = 100
    iterations: int = 300
    patience: int = 50
    start: Start = "local"
    scale_min: float = 0.003
    scale_max: float = 0.3
    crossover: float = 0.7
    factor_min: float = 0.5
    factor_max: float = 1.0
    reach: float = 2.0

    def __post_init__(self) -> None:
        name = "DifferentialEvolution"
        check_start(self, population=4)
        check_real(
            f"{name}.crossover",
            self.crossover,
            "share",
            "give a share from 0 to 1.",
            least=0,
            most=1,
        )
        check_real(
            f"{name}.reach", self.reach, "number", "give a finite number of at least 1.", least=1
        )
        for number in ("factor_min", "factor_max"):
            check_real(
                f"{name}.{number}",
                getattr(self, number),
                "number",
                "give a finite number >= 0.",
                least=0,
            )
        if self.factor_min > self.factor_max:
            raise ConfigurationError(
                f"`{name}.factor_min={self.factor_min!r}` is above `factor_max={self.factor_max!r}`.",
                "give 0 <= factor_min <= factor_max.",
            )

    @property
    def n_candidates(self) -> int:
        return self.population

    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Population:
        members = first_positions(
            origin, streams, self.population, self.start, self.scale_min, self.scale_max
        )
        lowest, highest = (
            broadcast_stat(origin.stats.lowest, origin),
            broadcast_stat(origin.stats.highest, origin),
        )
        return Population(
            members=members,
            fitness=torch.full(
                members.shape[:2], -math.inf, dtype=widest(members.device), device=members.device
            ),
            candidates=members,
            lowest=torch.minimum(lowest, self.reach * lowest),
            highest=torch.maximum(highest, self.reach * highest),
            searched=origin.searched,
        )

    def ask(self, state: Population, streams: RandomStreams) -> Population:
        x = state.members
        _, n, n_weights = x.shape
        a, b, c = three_others(streams.uniform(x, 3, n, 1)[..., 0])
        factor = self.factor_min + (self.factor_max - self.factor_min) * streams.uniform(x, 1, 1)
        mutant = _members(x, a) + factor * (_members(x, b) - _members(x, c))
        mutant = mutant.clamp(state.lowest, state.highest)
        crossed = streams.uniform(x, n, n_weights) < self.crossover
        # Computed on the device, since a transfer of the sizes from the CPU would make the device
        # wait.
        sizes = n_weights if state.searched is None else state.searched.sum(-1).to(x)
        always = (streams.uniform(x, n, 1)[..., 0] * sizes).long().clamp(max=n_weights - 1)
        crossed = crossed.scatter(2, always[..., None], torch.ones_like(crossed[..., :1]))
        if state.searched is not None:
            crossed = crossed & state.searched
        return state._replace(candidates=torch.where(crossed, mutant, x))

    def tell(self, state: Population, fitness: Tensor) -> Population:
        """Replaces each member by its trial if the trial's fitness, `S x P`, is at least as high.
        NaN ranks last.
        """
        fitness = fitness.to(state.fitness.dtype)
        fitness = fitness.masked_fill(fitness.isnan(), -math.inf)
        better = fitness >= state.fitness
        return state._replace(
            members=torch.where(better[..., None], state.candidates, state.members),
            fitness=torch.where(better, fitness, state.fitness),
        )


def three_others(uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turns random numbers from [0, 1), `3 x S x P`, into indices of three distinct other members
    for
    each member.

    Example:
        >>> [others.tolist() for others in three_others(torch.tensor([[[0.0] * 4], [[0.0] * 4], [[0.0] * 4]]))]
        [[[1, 0, 0, 0]], [[2, 2, 1, 1]], [[3, 3, 3, 2]]]
    """
    n = uniform.shape[-1]
    taken = [torch.arange(n, device=uniform.device).expand(uniform.shape[1:])]
    for drawn in uniform:
        left = n - len(taken)
        other = (drawn * left).long().clamp(max=left - 1)
        for place in torch.stack(taken).sort(0).values:
            other = other + (other >= place)
        taken.append(other)
    return taken[1], taken[2], taken[3]


def _members(x: Tensor, which: Tensor) -> Tensor:
    return x.gather(1, which[..., None].expand(-1, -1, x.shape[2]))
