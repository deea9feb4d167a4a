"""A searcher that is no swarm runs through the same loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_searcher import RandomLocalSearch, Walk

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.search import (
    SEARCHERS,
    Fitness,
    ParticleSwarm,
    RandomStreams,
    Searcher,
    SearchOrigin,
    SearchResult,
    WeightStats,
    search,
    search_many,
)
from lightning_nrl.search.scores import Scores

STATS = WeightStats(mean=0.0, std=1.0, lowest=-3.0, highest=3.0)
HOW = RandomLocalSearch(step=0.2)
N = 50


def wall(values: Tensor) -> Scores:
    """The first weight below 0 breaks a passed sample, within 1/4 of 1/2 it repairs a failed one."""
    first = values[..., 0].double()
    loss = (first - 0.5).abs()
    return Scores((loss < 0.25).double(), N - (first < 0).double(), loss, loss, 1, N)


class GivingUp:
    """`wall`, which does not finish candidates that break too many."""

    gives_up = True

    def __init__(self) -> None:
        self.given_up = 0

    def __call__(self, values: Tensor, most_broken: Tensor | None = None) -> Scores:
        scores = wall(values)
        if most_broken is None:
            return scores
        out = N - scores.intact > most_broken
        self.given_up += int(out.sum())
        loss = scores.loss_failed.masked_fill(out, torch.nan)
        return Scores(scores.patched + 99 * out, scores.intact, loss, loss, 1, N)


def original(n_searches: int = 1, n_weights: int = 3) -> Tensor:
    return 0.9 + torch.rand(n_searches, n_weights, generator=torch.Generator().manual_seed(0))


def same(a: SearchResult, b: SearchResult) -> bool:
    """The same but for the mean fitness, which leaves out candidates that were given up."""
    curves = ("best", "patched", "intact", "loss_failed", "loss_passed", "diversity")
    return (
        torch.equal(a.values, b.values)
        and (a.fitness, a.iterations, a.stopped) == (b.fitness, b.iterations, b.stopped)
        and all(torch.equal(getattr(a.history, name), getattr(b.history, name)) for name in curves)
    )


def test_both_are_searchers_and_names_stand_for_them() -> None:
    assert isinstance(HOW, Searcher)
    assert isinstance(ParticleSwarm(), Searcher)
    assert SEARCHERS.parse("searcher", "swarm") == ParticleSwarm()
    assert SEARCHERS.parse("searcher", HOW) is HOW
    for wrong, message in (("swam", "did you mean 'swarm'"), (3, "is no searcher"), (ParticleSwarm, "is no searcher")):
        with pytest.raises(ConfigurationError, match=message):
            search(wall, original()[0], STATS, searcher=wrong)  # type: ignore[arg-type]


def test_the_loop_gives_it_a_history_patience_and_the_best_candidate() -> None:
    result = search(wall, original()[0], STATS, searcher=replace(HOW, patience=5))
    assert result.original_fitness == 0.25
    assert result.fitness > 1
    assert (result.history.best.diff() >= 0).all()
    assert wall(result.values[None, None]).patched.item() == result.history.patched[-1] == 1
    assert result.stopped == "no better fitness in 5 iterations"
    assert result.iterations == result.history.best.argmax() + 5


def test_a_search_among_many_finds_what_it_finds_alone_also_with_padding() -> None:
    begin, sizes = original(3), [3, 1, 2]
    together = search_many(wall, begin, STATS, seeds=[5, 6, 7], searcher=HOW, sizes=sizes)
    for s, size in enumerate(sizes):
        alone = search(wall, begin[s, :size], STATS, searcher=HOW, seed=5 + s)
        assert torch.equal(together[s].values, alone.values)
        assert (together[s].iterations, together[s].fitness) == (alone.iterations, alone.fitness)


@pytest.mark.parametrize("fitness", [Fitness(), Fitness("eq1", perfect_intact=True), Fitness("eq2")], ids=str)
def test_giving_up_early_finds_what_finishing_finds(fitness: Fitness) -> None:
    giving_up, arguments = GivingUp(), {"searcher": replace(HOW, step=1.0), "fitness": fitness}
    assert same(search(giving_up, original()[0], STATS, **arguments), search(wall, original()[0], STATS, **arguments))
    assert (giving_up.given_up > 0) == (fitness.most_broken(torch.zeros(1, 1), 1) is not None)


class Ranking(RandomLocalSearch):
    """Looks at the ranks of all candidates, as an evolution strategy does: none can be given up."""

    def ask(self, state: Any, streams: RandomStreams) -> Any:
        return Ranked(*super().ask(state, streams))

    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Any:
        return Ranked(*super().init(origin, streams))


class Ranked(Walk):
    @property
    def threshold(self) -> None:
        return None


def test_where_every_fitness_matters_no_candidate_is_given_up() -> None:
    giving_up = GivingUp()
    assert same(
        search(giving_up, original()[0], STATS, searcher=Ranking(step=1.0)),
        search(wall, original()[0], STATS, searcher=RandomLocalSearch(step=1.0)),
    )
    assert giving_up.given_up == 0


def test_nothing_is_worth_less_than_an_elite() -> None:
    elite = torch.tensor([[0.5, 2.0, 3.0]])
    result = search(wall, original()[0], STATS, searcher=replace(HOW, iterations=0), elites=elite)
    assert torch.equal(result.values, elite[0])


class Short(RandomLocalSearch):
    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Walk:
        state = super().init(origin, streams)
        return state._replace(candidates=state.candidates[:, :-1])


class WithoutElites(RandomLocalSearch):
    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Walk:
        return super().init(replace(origin, elites=None), streams)


@pytest.mark.parametrize("how", [Short(), WithoutElites()], ids=lambda how: type(how).__name__)
def test_first_candidates_without_the_original_weights_and_the_elites_are_refused(how: RandomLocalSearch) -> None:
    with pytest.raises(ConfigurationError, match=f"{type(how).__name__}.init does not begin with"):
        search(wall, original()[0], STATS, searcher=how, elites=torch.zeros(1, 3))
