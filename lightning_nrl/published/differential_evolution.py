"""Differential evolution, rand/1/bin (Storn & Price 1997), as used by Arachne's second version."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_nrl._utils.device import widest
from lightning_nrl.errors import ConfigurationError, check_real
from lightning_nrl.search.first_positions import Start, check_start, first_positions
from lightning_nrl.search.searcher import RandomStream, Searcher, SearchOrigin, check_counts


class Population(NamedTuple):
    """State of differential evolution: P members over K weights."""

    members: Tensor  # P x K
    fitness: Tensor  # P, minus infinity before the first candidates are scored
    candidates: Tensor  # P x K, the trial of each member (see `DifferentialEvolution`)
    lowest: Tensor  # broadcasts to P x K, lower bound of the weights
    highest: Tensor  # broadcasts to P x K, upper bound of the weights

    @property
    def threshold(self) -> Tensor:
        """Largest number below each member's fitness, `P`.

        A trial of equal fitness replaces its member.
        """
        return torch.nextafter(self.fitness, torch.full_like(self.fitness, -math.inf))


@dataclass(frozen=True)
class DifferentialEvolution(Searcher):
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
        check_counts(self, "population", least=4)
        check_start(name, self.start, self.scale_min, self.scale_max)
        hint = "give a share from 0 to 1."
        check_real(f"{name}.crossover", self.crossover, "share", hint, least=0, most=1)
        hint = "give a finite number of at least 1."
        check_real(f"{name}.reach", self.reach, "number", hint, least=1)
        hint = "give a finite number >= 0."
        check_real(f"{name}.factor_min", self.factor_min, "number", hint, least=0)
        check_real(f"{name}.factor_max", self.factor_max, "number", hint, least=0)
        if self.factor_min > self.factor_max:
            raise ConfigurationError(
                f"`{name}.factor_min={self.factor_min!r}` is above "
                f"`factor_max={self.factor_max!r}`.",
                "give 0 <= factor_min <= factor_max.",
            )

    @property
    def n_candidates(self) -> int:
        return self.population

    def init(self, origin: SearchOrigin, random: RandomStream) -> Population:
        n = self.population
        members = first_positions(origin, random, n, self.start, self.scale_min, self.scale_max)
        lowest = origin.tensor(origin.stats.lowest)
        highest = origin.tensor(origin.stats.highest)
        return Population(
            members=members,
            fitness=members.new_full((n,), -math.inf, dtype=widest(members.device)),
            candidates=members,
            lowest=torch.minimum(lowest, self.reach * lowest),
            highest=torch.maximum(highest, self.reach * highest),
        )

    def ask(self, state: Population, random: RandomStream) -> Population:
        members = state.members
        n, n_weights = members.shape
        a, b, c = three_others(random.uniform(members, 3, n))
        spread = self.factor_max - self.factor_min
        factor = self.factor_min + spread * random.uniform(members, 1)
        mutant = members[a] + factor * (members[b] - members[c])
        mutant = mutant.clamp(state.lowest, state.highest)
        is_crossed = random.uniform(members, n, n_weights) < self.crossover
        always_crossed = (random.uniform(members, n, 1) * n_weights).long()
        always_crossed = always_crossed.clamp(max=n_weights - 1)
        is_crossed = is_crossed.scatter(1, always_crossed, True)
        return state._replace(candidates=torch.where(is_crossed, mutant, members))

    def tell(self, state: Population, fitness: Tensor) -> Population:
        """Replaces each member by its trial if the trial's fitness, `P`, is at least as high."""
        better = fitness >= state.fitness
        return state._replace(
            members=torch.where(better[:, None], state.candidates, state.members),
            fitness=torch.where(better, fitness, state.fitness),
        )


def three_others(uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns indices of three distinct other members for each member.

    `uniform`, `3 x P`, are random numbers from [0, 1).

    Example:
        >>> [member.tolist() for member in three_others(torch.zeros(3, 4))]
        [[1, 0, 0, 0], [2, 2, 1, 1], [3, 3, 3, 2]]
    """
    n = uniform.shape[-1]
    taken = [torch.arange(n, device=uniform.device)]
    for drawn in uniform:
        n_left = n - len(taken)
        member = (drawn * n_left).long().clamp(max=n_left - 1)
        for place in torch.stack(taken).sort(0).values:
            member = member + (member >= place)
        taken.append(member)
    return taken[1], taken[2], taken[3]
