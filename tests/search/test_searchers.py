"""Differential evolution and CMA-ES: their steps by hand, and what every searcher has to keep."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_protocol import STATS, GivingUp, original, same, wall
from torch import Tensor

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.search import (
    SEARCHERS,
    CmaEs,
    DifferentialEvolution,
    ParticleSwarm,
    RandomStreams,
    Searcher,
    SearchOrigin,
    WeightStats,
    search,
    search_many,
)
from lightning_nrl.search.differential_evolution import three_others
from lightning_nrl.search.scores import Scores

ALL = [
    pytest.param(DifferentialEvolution(population=12, iterations=40, patience=20), id="differential evolution"),
    pytest.param(CmaEs(population=12, iterations=40, patience=20), id="CMA-ES"),
    pytest.param(CmaEs(population=12, iterations=40, patience=20, covariance="diagonal"), id="diagonal CMA-ES"),
    pytest.param(ParticleSwarm(particles=12, iterations=40, patience=20, start="normal"), id="swarm"),
]


def sphere(values: Tensor) -> Scores:
    """The loss is the mean square; nothing is ever repaired or broken."""
    loss = values.double().square().mean(-1)
    none = torch.zeros_like(loss)
    return Scores(none, none + 50, loss, loss, 50, 50)


@pytest.mark.parametrize("how", [DifferentialEvolution(), CmaEs(sigma=0.3), CmaEs(sigma=0.3, covariance="diagonal")])
def test_solves_a_sphere(how: Searcher[Any]) -> None:
    assert search(sphere, original(1, 4)[0], STATS, searcher=how).history.loss_failed[-1] < 1e-3


@pytest.mark.parametrize("how", ALL)
def test_a_search_among_many_finds_what_it_finds_alone_also_with_padding(how: Searcher[Any]) -> None:
    begin, sizes = original(3), [3, 1, 2]
    together = search_many(wall, begin, STATS, seeds=[5, 6, 7], searcher=how, sizes=sizes)
    for s, size in enumerate(sizes):
        alone = search(wall, begin[s, :size], STATS, searcher=how, seed=5 + s)
        assert torch.equal(together[s].values, alone.values)
        assert (together[s].iterations, together[s].fitness) == (alone.iterations, alone.fitness)


@pytest.mark.parametrize("how", ALL)
def test_the_original_and_the_elites_are_scored_first_and_nothing_is_worth_less(how: Searcher[Any]) -> None:
    seen: list[Tensor] = []

    def scorer(values: Tensor) -> Scores:
        seen.append(values.clone())
        return wall(values)

    elite = torch.tensor([[0.5, 2.0, 3.0]])
    result = search(scorer, original()[0], STATS, searcher=how, elites=elite)
    assert torch.equal(seen[0][0, :2], torch.cat([original(), elite]))
    assert result.fitness >= wall(elite[None]).patched.item()
    torch.manual_seed(1)
    again = search(wall, original()[0], STATS, searcher=how, elites=elite)
    assert same(result, again)


@pytest.mark.parametrize("how", ALL)
def test_giving_up_early_finds_what_finishing_finds(how: Searcher[Any]) -> None:
    wide = WeightStats(mean=0.0, std=4.0, lowest=-9.0, highest=9.0)
    giving_up = GivingUp()
    assert same(search(giving_up, original()[0], wide, searcher=how), search(wall, original()[0], wide, searcher=how))
    assert (giving_up.given_up > 0) == (not isinstance(how, CmaEs))


class Drawn:
    """In place of `RandomStreams`: numbers that are given."""

    sizes = None

    def __init__(self, *numbers: Tensor) -> None:
        self.numbers = list(numbers)

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        return self.numbers.pop(0)


def test_a_trial_by_hand() -> None:
    how = DifferentialEvolution(population=4, crossover=0.5, start="normal")
    stats = WeightStats(mean=0.0, std=1.0, lowest=-1.0, highest=2.0)
    state = how.init(SearchOrigin(torch.zeros(1, 2), stats), RandomStreams.seeded([0]))
    members = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [2.0, -1.0], [5.0, 3.0]]])
    drawn: Any = Drawn(
        torch.zeros(3, 1, 4, 1),  # the others are 1 2 3, 0 2 3, 0 1 3, 0 1 2
        torch.full((1, 1, 1), 0.5),  # F = 0.75
        torch.tensor([[[0.4, 0.6], [0.6, 0.6], [0.4, 0.4], [0.6, 0.4]]]),  # which weights are crossed
        torch.tensor([[[0.0], [0.9], [0.0], [0.9]]]),  # which one always is
    )
    trials = how.ask(state._replace(members=members), drawn).candidates
    # Mutants: (-1.25, -2) and (-2.25, -3), (-3, -1.5) and (-0.75, 1.5), clipped to [-2, 4].
    assert trials[0].tolist() == [[-1.25, 0.0], [1.0, -2.0], [-2.0, -1.5], [5.0, 1.5]]
    told = how.tell(state._replace(members=members, candidates=trials), torch.tensor([[1.0, torch.nan, -1.0, 0.0]]))
    assert told.fitness.tolist() == [[1.0, -torch.inf, -1.0, 0.0]]
    then = how.tell(told._replace(candidates=members), torch.tensor([[0.5, -2.0, -1.0, 0.0]]))
    assert then.members[0].tolist() == [[-1.25, 0.0], [1.0, 1.0], [2.0, -1.0], [5.0, 3.0]]


def test_others_are_different_and_all_as_likely() -> None:
    drawn = torch.rand(3, 200, 6, generator=torch.Generator().manual_seed(0))
    others = torch.stack([torch.arange(6).expand(200, 6), *three_others(drawn)])
    assert (others.sort(0).values.diff(dim=0) > 0).all()
    assert (others[1:].flatten(1).sum(1).float().mean() / 1200 - 2.5).abs() < 0.1
    counts = torch.stack([row.flatten().bincount() for row in others[1:]])
    assert (counts - 200).abs().max() < 60


def test_cma_es_begins_at_the_best_of_the_first_and_leaves_random_numbers_alone() -> None:
    how = CmaEs(population=4, sigma=0.1)
    streams = RandomStreams.seeded([0])
    state = how.init(SearchOrigin(original(), STATS), streams)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    told = how.tell(state, torch.tensor([[0.0, 1.0, 3.0, 2.0]]))
    assert told.strategies is not None
    assert told.strategies[0].mean.tolist() == pytest.approx((state.candidates[0, 2] - original()[0]).tolist())
    how.tell(how.ask(told, streams), torch.full((1, 4), -torch.inf))  # nothing to learn from
    assert told.strategies[0].generation == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_names() -> None:
    assert SEARCHERS.parse("searcher", "differential-evolution") == DifferentialEvolution()
    assert SEARCHERS.parse("searcher", "cma-es") == CmaEs()


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ConfigurationError, match=r"lightning_nrl\[cmaes\]"):
        CmaEs()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DifferentialEvolution(population=3), "population"),
        (lambda: DifferentialEvolution(crossover=1.5), "crossover"),
        (lambda: DifferentialEvolution(factor_min=2.0), "factor_min"),
        (lambda: DifferentialEvolution(reach=0.5), "reach"),
        (lambda: DifferentialEvolution(start="near"), "start"),  # type: ignore[arg-type]
        (lambda: CmaEs(sigma=0.0), "sigma"),
        (lambda: CmaEs(covariance="ful"), "did you mean 'full'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
