"""What every searcher has to keep, a new one too; the steps of the built-in ones by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from searches import WIDE, Quitting, first_weight, original, same, sphere, wall
from torch import Tensor, nn
from toy_searcher import RandomLocalSearch, Walk

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.published import CmaEs, DifferentialEvolution
from lightning_nrl.published.differential_evolution import three_others
from lightning_nrl.search import (
    SEARCHERS,
    ParticleSwarm,
    RandomStreams,
    Searcher,
    SearchOrigin,
    Swarm,
    WeightStats,
    search,
    search_many,
)
from lightning_nrl.search.scores import Scores

SPREAD = WeightStats(mean=5.0, std=2.0, lowest=-1.0, highest=9.0)
HOW = RandomLocalSearch(step=0.2)
ALL = [
    pytest.param(HOW, id="a new one"),
    pytest.param(
        DifferentialEvolution(population=12, iterations=40, patience=20),
        id="differential evolution",
    ),
    pytest.param(CmaEs(population=12, iterations=40, patience=20), id="CMA-ES"),
    pytest.param(
        CmaEs(population=12, iterations=40, patience=20, covariance="diagonal"),
        id="diagonal CMA-ES",
    ),
    pytest.param(
        ParticleSwarm(particles=12, iterations=40, patience=20, start="normal"), id="swarm"
    ),
]


def begin(n: int = 1) -> Tensor:
    return original(n, 3, least=0.9)


def test_names_stand_for_searchers() -> None:
    for name, how in (
        ("swarm", ParticleSwarm()),
        ("differential-evolution", DifferentialEvolution()),
        ("cma-es", CmaEs()),
    ):
        assert isinstance(how, Searcher)
        assert SEARCHERS.parse("searcher", name) == how
    assert SEARCHERS.parse("searcher", HOW) is HOW
    for wrong, message in (
        ("swam", "did you mean 'swarm'"),
        (3, "is no searcher"),
        (ParticleSwarm, "is no searcher"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            search(wall, begin()[0], WIDE, searcher=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "how", [DifferentialEvolution(), CmaEs(sigma=0.3), CmaEs(sigma=0.3, covariance="diagonal")]
)
def test_solves_a_sphere(how: Searcher[Any]) -> None:
    assert search(sphere, original()[0], WIDE, searcher=how).history.loss_failed[-1] < 1e-3


@pytest.mark.parametrize("how", ALL)
def test_a_search_among_many_finds_what_it_finds_alone_also_with_padding(
    how: Searcher[Any],
) -> None:
    first, sizes = begin(3), [3, 1, 2]
    together = search_many(first_weight, first, WIDE, seeds=[5, 6, 7], searcher=how, sizes=sizes)
    for s, size in enumerate(sizes):
        alone = search(first_weight, first[s, :size], WIDE, searcher=how, seed=5 + s)
        assert torch.equal(together[s].values, alone.values)
        assert (together[s].iterations, together[s].fitness) == (alone.iterations, alone.fitness)


@pytest.mark.parametrize("how", ALL)
def test_the_original_and_the_elites_are_scored_first_and_nothing_is_worth_less(
    how: Searcher[Any],
) -> None:
    seen: list[Tensor] = []

    def scorer(values: Tensor) -> Scores:
        seen.append(values.clone())
        return first_weight(values)

    elite = torch.tensor([[0.5, 2.0, 3.0]])
    result = search(scorer, begin()[0], WIDE, searcher=how, elites=elite)
    assert torch.equal(seen[0][0, :2], torch.cat([begin(), elite]))
    assert result.fitness >= first_weight(elite[None]).patched.item()
    torch.manual_seed(1)
    assert same(result, search(first_weight, begin()[0], WIDE, searcher=how, elites=elite))


@pytest.mark.parametrize("how", ALL)
def test_quitting_early_finds_what_finishing_finds(how: Searcher[Any]) -> None:
    wide = WeightStats(mean=0.0, std=4.0, lowest=-9.0, highest=9.0)
    how = replace(HOW, step=1.0) if how is HOW else how
    quitting = Quitting(first_weight)
    found = search(quitting, begin()[0], wide, searcher=how)
    assert same(found, search(first_weight, begin()[0], wide, searcher=how))
    assert (quitting.given_up > 0) == (not isinstance(how, CmaEs))


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
    quitting = Quitting(first_weight)
    assert same(
        search(quitting, begin()[0], WIDE, searcher=Ranking(step=1.0)),
        search(first_weight, begin()[0], WIDE, searcher=RandomLocalSearch(step=1.0)),
    )
    assert quitting.given_up == 0


class Short(RandomLocalSearch):
    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Walk:
        state = super().init(origin, streams)
        return state._replace(candidates=state.candidates[:, :-1])


class WithoutElites(RandomLocalSearch):
    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Walk:
        return super().init(replace(origin, elites=None), streams)


@pytest.mark.parametrize("how", [Short(), WithoutElites()], ids=lambda how: type(how).__name__)
def test_first_candidates_without_the_original_weights_and_the_elites_are_refused(
    how: RandomLocalSearch,
) -> None:
    with pytest.raises(ConfigurationError, match=f"{type(how).__name__}.init does not begin with"):
        search(wall, begin()[0], WIDE, searcher=how, elites=torch.zeros(1, 3))


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
        torch.tensor(
            [[[0.4, 0.6], [0.6, 0.6], [0.4, 0.4], [0.6, 0.4]]]
        ),  # which weights are crossed
        torch.tensor([[[0.0], [0.9], [0.0], [0.9]]]),  # which one always is
    )
    trials = how.ask(state._replace(members=members), drawn).candidates
    # Mutants: (-1.25, -2) and (-2.25, -3), (-3, -1.5) and (-0.75, 1.5), clipped to [-2, 4].
    assert trials[0].tolist() == [[-1.25, 0.0], [1.0, -2.0], [-2.0, -1.5], [5.0, 1.5]]
    told = how.tell(
        state._replace(members=members, candidates=trials),
        torch.tensor([[1.0, torch.nan, -1.0, 0.0]]),
    )
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
    state = how.init(SearchOrigin(original(), WIDE), streams)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    told = how.tell(state, torch.tensor([[0.0, 1.0, 3.0, 2.0]]))
    assert told.strategies is not None
    assert told.strategies[0].mean.tolist() == pytest.approx(
        (state.candidates[0, 2] - original()[0]).tolist()
    )
    how.tell(how.ask(told, streams), torch.full((1, 4), -torch.inf))  # nothing to learn from
    assert told.strategies[0].generation == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ConfigurationError, match=r"lightning_nrl\[cmaes\]"):
        CmaEs()


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_swarm_draws_the_same_alone_among_others_and_under_padding(kind: str) -> None:
    like = torch.zeros(0)
    many, alone = RandomStreams.seeded([3, 8, 5], [4, 2, 6]), RandomStreams.seeded([8])
    for lead in ((2,), (), (3,)):
        together = getattr(many, kind)(like, *lead, 5, 6)
        own = getattr(alone, kind)(like, *lead, 5, 2)
        assert torch.equal(together[..., 1, :, :2], own[..., 0, :, :])
        assert not together[..., 1, :, 2:].any()
    assert torch.equal(getattr(many, kind)(like, 5, 1)[1], getattr(alone, kind)(like, 5, 1)[0])
    assert many.seeds()[1] == alone.seeds()[0] < 2**31


def test_each_weight_has_the_numbers_of_its_own_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 3.0]]))
        model[1].weight.fill_(10.0)
    with torch.device("meta"):  # a default device of the user's makes no difference
        stats = WeightStats.around(
            find_layers(model, ["0", "1"]), torch.tensor([1, 2], device="cpu")
        )
    found = [x.tolist() for x in (stats.mean, stats.std, stats.lowest, stats.highest)]
    assert found == [[2.0, 10.0], [1.0, 0.0], [1.0, 10.0], [3.0, 10.0]]
    one = WeightStats.of(torch.tensor([2.0]))  # has no deviation rather than NaN
    assert (float(one.mean), float(one.std)) == (2.0, 0.0)


class Fixed:
    """RandomStreams whose uniform numbers are known: r_1 = 0.5, r_2 = 0.25 for every weight."""

    def uniform(self, like, *shape):
        self.shape = shape
        return torch.tensor([0.5, 0.25]).view(2, 1, 1, 1).expand(shape[0], 1, *shape[1:])


def start(original, stats, how, streams, elites=None):
    """The first swarm, padding as the streams have it."""
    searched = None
    if streams.sizes is not None:
        searched = torch.arange(original.shape[1]) < torch.tensor(streams.sizes)[:, None, None]
    return how.init(SearchOrigin(original.float(), stats, elites, searched), streams)


def swarm(velocity, width=20.0, **changes):
    """One swarm of one particle at x = 1 in each of two weights, own best 2, leader 4."""
    x = torch.ones(1, 1, 2)
    state = Swarm(
        position=x,
        velocity=torch.tensor([[velocity]]),
        best_position=2 * x,
        best_fitness=torch.tensor([[1.0]]),
        leader=4 * x[:, 0],
        leader_fitness=torch.tensor([3.0]),
        free=torch.tensor(True),
        range=torch.tensor(width),
    )
    return state._replace(**changes)


def first_swarm(kind="local", particles=9, seeds=(0,), original=None, sizes=None, **changes):
    original = (
        torch.tensor([[0.5, -1.5, 2.0]]).repeat(len(seeds), 1) if original is None else original
    )
    how = ParticleSwarm(particles=particles, start=kind, **changes)
    return start(original, SPREAD, how, RandomStreams.seeded(seeds, sizes))


def test_clerc_step_by_hand():
    streams = Fixed()
    moved = ParticleSwarm().ask(swarm([0.5, 0.0]), streams)
    # 0.7298 * (v + 2.05 * 0.5 * (2 - 1) + 2.05 * 0.25 * (4 - 1)), v = 0.5 and 0
    torch.testing.assert_close(moved.velocity, torch.tensor([[[2.2350125, 1.8701125]]]))
    torch.testing.assert_close(moved.position, torch.tensor([[[3.2350125, 2.8701125]]]))
    assert streams.shape == (2, 1, 2)


def test_a_step_with_coefficients_of_ones_own_by_hand():
    how = ParticleSwarm(inertia=0.5, cognitive=2, social=1, max_speed=0.1, min_speed=0.05)
    free = replace(how, max_speed=9, min_speed=0).ask(swarm([0.5, -4.0]), Fixed())
    # v / 2 + 2 * 0.5 * (2 - 1) + 1 * 0.25 * (4 - 1), v = 0.5 and -4
    torch.testing.assert_close(free.velocity, torch.tensor([[[2.0, -0.25]]]))
    # Between 0.05 and 0.1 of the range of 20.
    limited = how.ask(swarm([0.5, -4.0]), Fixed())
    torch.testing.assert_close(limited.velocity, torch.tensor([[[2.0, -1.0]]]))


def test_arachne_step_by_hand():
    streams = Fixed()
    moved = ParticleSwarm(constants="arachne").ask(swarm([0.5, 0.0], width=3.0), streams)
    # 0.7298 * (v + 4.1 * 0.5 * (2 - 1) + 4.1 * 0.25 * (4 - 1)), v = 0.5 and 0
    torch.testing.assert_close(moved.velocity, torch.tensor([[[4.105125, 3.740225]]]))
    assert streams.shape == (2, 1, 1)


@pytest.mark.parametrize("constants", ["clerc", "arachne"])
def test_what_is_not_free_never_moves(constants):
    free = torch.tensor([[[True, False]]])
    moved = ParticleSwarm(constants=constants).ask(swarm([0.5, 0.5], free=free), Fixed())
    assert moved.position[0, 0, 1] == 1 != moved.position[0, 0, 0]
    assert moved.velocity[0, 0, 1] == 0


def test_tell_remembers_the_better_and_keeps_the_earlier_among_equals():
    state = Swarm(
        position=torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]),
        velocity=torch.zeros(1, 4, 1),
        best_position=torch.zeros(1, 4, 1),
        best_fitness=torch.tensor([[5.0, 5.0, 5.0, 5.0]]),
        leader=torch.zeros(1, 1),
        leader_fitness=torch.tensor([5.0]),
        free=torch.tensor(True),
        range=torch.tensor(1.0),
    )
    same = ParticleSwarm().tell(state, torch.tensor([[5.0, 4.0, math.nan, -math.inf]]))
    assert torch.equal(same.best_position, state.best_position)
    assert torch.equal(same.leader, state.leader)
    told = ParticleSwarm().tell(state, torch.tensor([[math.nan, 6.0, 7.0, 7.0]]))
    assert told.best_position.flatten().tolist() == [0.0, 2.0, 3.0, 4.0]
    assert told.best_fitness.tolist() == [[5.0, 6.0, 7.0, 7.0]]
    assert (told.leader.tolist(), told.leader_fitness.tolist()) == ([[3.0]], [7.0])


@pytest.mark.parametrize(
    ("kind", "at_original", "near"), [("local", 1, 8), ("half", 1, 4), ("paper", 5, 0)]
)
def test_where_particles_start(kind, at_original, near):
    position = first_swarm(kind, scale_min=1e-6, scale_max=1e-6).position[0]
    distance = (position - torch.tensor([0.5, -1.5, 2.0])).abs().amax(1)
    assert (distance[:at_original] == 0).all()
    around = distance[at_original : at_original + near]
    assert ((around > 0) & (around < 1e-4)).all()
    assert (distance[at_original + near :] > 0.1).all()


def test_local_scales_are_spread_on_a_logarithmic_scale():
    near = first_swarm(
        particles=5, original=torch.zeros(1, 20_000), scale_min=0.01, scale_max=10.0
    ).position[0]
    torch.testing.assert_close(
        near.std(1), 2.0 * torch.tensor([0.0, 0.01, 0.1, 1.0, 10.0]), rtol=0.05, atol=0
    )


def test_elites_are_placed_then_the_lines_to_them_then_what_is_around():
    original = torch.tensor([[1.0, 0.0]])
    elites = torch.tensor([[[3.0, 4.0], [1.0, -2.0]]])
    how = ParticleSwarm(particles=15, scale_min=1e-6, scale_max=1e-6)
    placed = start(original, SPREAD, how, RandomStreams.seeded([0]), elites).position[0]
    lines = torch.tensor(
        [[3.3, 4.6], [1.0, -2.3], [2.6, 3.2], [1.0, -1.6], [2.0, 2.0], [1.0, -1.0]]
    )
    around = torch.cat([original, elites[0]]).repeat(2, 1)
    assert torch.equal(placed[:3], torch.cat([original, elites[0]]))
    torch.testing.assert_close(placed[3:9], lines)
    torch.testing.assert_close(placed[9:], around, rtol=0, atol=1e-4)
    assert (placed[9:] != around).any(1).all()


@pytest.mark.parametrize("kind", ["local", "half", "paper"])
def test_elites_take_the_places_of_particles_and_leave_padding_alone(kind):
    original = torch.tensor([[1.0, 2.0, 7.0]])
    elites = torch.full((1, 6, 3), 5.0)
    without, with_ = (
        start(
            original,
            SPREAD,
            ParticleSwarm(particles=8, start=kind),
            RandomStreams.seeded([0], [2]),
            given,
        )
        for given in (None, elites)
    )
    assert with_.position.shape == without.position.shape == (1, 8, 3)
    assert torch.equal(with_.position[0, 1:7, :2], elites[0, :, :2])
    assert torch.equal(with_.position[..., 2], original[:, None, 2].expand(1, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParticleSwarm(inertia=-0.1), "ParticleSwarm.inertia=-0.1"),
        (lambda: ParticleSwarm(cognitive=math.nan), "ParticleSwarm.cognitive=nan"),
        (lambda: ParticleSwarm(social="2"), "ParticleSwarm.social='2'"),
        (
            lambda: ParticleSwarm(min_speed=0.3),
            "min_speed=0.3` and `max_speed=0.2` are not a range",
        ),
        (lambda: ParticleSwarm(max_speed=0), "min_speed=0.0` and `max_speed=0` are not a range"),
        (lambda: ParticleSwarm(start="locale"), "did you mean 'local'"),
        (lambda: ParticleSwarm(constants="clark"), "did you mean 'clerc'"),
        (lambda: ParticleSwarm(particles=1), "`ParticleSwarm.particles=1`"),
        (lambda: ParticleSwarm(particles=10.5), "`ParticleSwarm.particles=10.5`"),
        (lambda: ParticleSwarm(iterations=-1), "`ParticleSwarm.iterations=-1`"),
        (lambda: ParticleSwarm(patience=0), "`ParticleSwarm.patience=0`"),
        (lambda: ParticleSwarm(scale_min="small"), "`ParticleSwarm.scale_min='small'`"),
        (lambda: ParticleSwarm(scale_min=0.0), "`ParticleSwarm.scale_min=0.0`"),
        (lambda: ParticleSwarm(scale_min=2.0), "`scale_max=0.3`"),
        (lambda: ParticleSwarm(scale_max=math.inf), "`scale_max=inf`"),
        (lambda: DifferentialEvolution(population=3), "population"),
        (lambda: DifferentialEvolution(crossover=1.5), "crossover"),
        (lambda: DifferentialEvolution(factor_min=2.0), "factor_min"),
        (lambda: DifferentialEvolution(reach=0.5), "reach"),
        (lambda: DifferentialEvolution(start="near"), "start"),
        (lambda: CmaEs(sigma=0.0), "sigma"),
        (lambda: CmaEs(covariance="ful"), "did you mean 'full'"),
    ],
)
def test_wrong_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match="HINT: ") as error:
        make()
    assert message in str(error.value)
