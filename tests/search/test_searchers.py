"""What every searcher has to keep, a new one too; the steps of the built-in ones by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from searches import WIDE, Plain, Quitting, original, same, sphere, wall
from torch import Tensor, nn
from toy_searcher import RandomLocalSearch, Walk

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.published import DifferentialEvolution
from lightning_nrl.search import (
    SEARCHERS,
    ParticleSwarm,
    RandomStream,
    SearchOrigin,
    Swarm,
    WeightStats,
    search,
)

SPREAD = WeightStats(mean=5.0, std=2.0, lowest=-1.0, highest=9.0)
NO_ELITES = torch.zeros(0, 3)
QUICK = {"population": 12, "iterations": 40, "patience": 20}
ALL = {
    "a new one": RandomLocalSearch(step=0.2),
    "differential evolution": DifferentialEvolution(**QUICK),
    "swarm": ParticleSwarm(particles=12, iterations=40, patience=20, start="normal"),
}
each_searcher = pytest.mark.parametrize("searcher", ALL.values(), ids=ALL)


def begin() -> Tensor:
    return original(3, least=0.9)


def test_names_stand_for_searchers():
    for name, searcher in (
        ("swarm", ParticleSwarm()),
        ("differential-evolution", DifferentialEvolution()),
        (RandomLocalSearch(), RandomLocalSearch()),
    ):
        assert SEARCHERS.parse("searcher", name) == searcher
    labels = [searcher.label for searcher in ALL.values()]
    assert labels == ["swarm", "differential evolution", "swarm"]
    for wrong, message in (
        ("swam", "did you mean 'swarm'"),
        (3, "is no searcher"),
        (ParticleSwarm, "is no searcher"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            search(wall, begin(), WIDE, searcher=wrong)


def test_solves_a_sphere():
    searcher = DifferentialEvolution()
    assert search(sphere, original(), WIDE, searcher=searcher).history.loss_failed[-1] < 1e-3


@each_searcher
def test_the_original_and_the_elites_are_scored_first_and_nothing_is_worth_less(searcher):
    scorer, elite = Plain(wall), torch.tensor([[0.5, 2.0, 3.0]])
    result = search(scorer, begin(), WIDE, searcher=searcher, elites=elite)
    assert torch.equal(scorer.seen[0][:2], torch.cat([begin()[None], elite]))
    assert result.fitness >= wall(elite).patched.item()
    torch.manual_seed(1)
    assert same(result, search(wall, begin(), WIDE, searcher=searcher, elites=elite))


@each_searcher
def test_quitting_early_finds_what_finishing_finds(searcher):
    wide = WeightStats(mean=0.0, std=4.0, lowest=-9.0, highest=9.0)
    if isinstance(searcher, RandomLocalSearch):
        searcher = replace(searcher, step=1.0)
    quitting = Quitting(wall)
    early = search(quitting, begin(), wide, searcher=searcher)
    assert same(early, search(wall, begin(), wide, searcher=searcher))
    # CMA-ES looks at the ranks of all candidates.
    assert quitting.given_up > 0


class WithoutElites(RandomLocalSearch):
    def init(self, origin: SearchOrigin, random: RandomStream) -> Walk:
        return super().init(replace(origin, elites=NO_ELITES), random)


def test_first_candidates_without_the_original_weights_and_the_elites_are_refused():
    for searcher in (WithoutElites(), WithoutElites(n_candidates=1)):
        with pytest.raises(ConfigurationError, match=r"WithoutElites.init does not begin with"):
            search(wall, begin(), WIDE, searcher=searcher, elites=torch.zeros(1, 3))


class Drawn(RandomStream):
    """Given numbers in place of random ones."""

    def __init__(self, *numbers: Tensor) -> None:
        self.numbers = list(numbers)

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        assert tuple(self.numbers[0].shape) == shape
        return self.numbers.pop(0)


def test_a_trial_by_hand():
    searcher = DifferentialEvolution(population=4, crossover=0.5, start="normal")
    stats = WeightStats(mean=0.0, std=1.0, lowest=-1.0, highest=2.0)
    origin = SearchOrigin(torch.zeros(2), stats, torch.zeros(0, 2))
    members = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, -1.0], [5.0, 3.0]])
    state = searcher.init(origin, RandomStream(0))._replace(members=members)
    drawn = Drawn(
        torch.zeros(3, 4),  # the others are 1 2 3, 0 2 3, 0 1 3, 0 1 2
        torch.tensor([0.5]),  # F = 0.75
        torch.tensor([[0.4, 0.6], [0.6, 0.6], [0.4, 0.4], [0.6, 0.4]]),  # which are crossed
        torch.tensor([[0.0], [0.9], [0.0], [0.9]]),  # which one always is
    )
    trials = searcher.ask(state, drawn).candidates
    # Mutants: (-1.25, -2) and (-2.25, -3), (-3, -1.5) and (-0.75, 1.5), clipped to [-2, 4].
    assert trials.tolist() == [[-1.25, 0.0], [1.0, -2.0], [-2.0, -1.5], [5.0, 1.5]]
    state = state._replace(candidates=trials)
    state = searcher.tell(state, torch.tensor([1.0, -torch.inf, -1.0, 0.0]))
    assert state.fitness.tolist() == [1.0, -torch.inf, -1.0, 0.0]
    state = state._replace(candidates=members)
    state = searcher.tell(state, torch.tensor([0.5, -2.0, -1.0, 0.0]))
    assert state.members.tolist() == [[-1.25, 0.0], [1.0, 1.0], [2.0, -1.0], [5.0, 3.0]]


def test_each_weight_has_the_numbers_of_its_own_layer():
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 3.0]]))
        model[1].weight.fill_(10.0)
    where = torch.tensor([1, 2])
    with torch.device("meta"):  # a default device of the user's makes no difference
        stats = WeightStats.around(find_layers(model, ["0", "1"]), where)
    columns = [x.tolist() for x in (stats.mean, stats.std, stats.lowest, stats.highest)]
    assert columns == [[2.0, 10.0], [1.0, 0.0], [1.0, 10.0], [3.0, 10.0]]


def swarm(velocity: list[float], width: float = 20.0, free: bool = True) -> Swarm:
    """A swarm of one particle at x = 1 in each of two weights, own best 2, leader 4."""
    x = torch.ones(1, 2)
    return Swarm(
        position=x,
        velocity=torch.tensor([velocity]),
        best_position=2 * x,
        best_fitness=torch.tensor([1.0]),
        leader=4 * x[0],
        leader_fitness=torch.tensor([3.0]),
        free=torch.tensor([[free]]),
        range=torch.tensor(width),
    )


def factors(n_weights: int) -> Drawn:
    """r_1 = 0.5, r_2 = 0.25."""
    return Drawn(torch.tensor([0.5, 0.25]).view(2, 1, 1).expand(2, 1, n_weights))


def test_steps_by_hand():
    moved = ParticleSwarm().ask(swarm([0.5, 0.0]), factors(2))
    # 0.7298 * (v + 2.05 * 0.5 * (2 - 1) + 2.05 * 0.25 * (4 - 1)), v = 0.5 and 0
    torch.testing.assert_close(moved.velocity, torch.tensor([[2.2350125, 1.8701125]]))
    torch.testing.assert_close(moved.position, torch.tensor([[3.2350125, 2.8701125]]))
    arachne = ParticleSwarm(constants="arachne")
    moved = arachne.ask(swarm([0.5, 0.0], width=3.0), factors(1))
    # 0.7298 * (v + 4.1 * 0.5 * (2 - 1) + 4.1 * 0.25 * (4 - 1)), v = 0.5 and 0
    torch.testing.assert_close(moved.velocity, torch.tensor([[4.105125, 3.740225]]))
    moved = ParticleSwarm().ask(swarm([0.5, 0.5], free=False), factors(2))
    assert (moved.position == 1).all()
    assert (moved.velocity == 0).all()


def test_a_step_with_coefficients_of_ones_own_by_hand():
    slow = ParticleSwarm(inertia=0.5, cognitive=2, social=1, max_speed=0.1, min_speed=0.05)
    moved = replace(slow, max_speed=9, min_speed=0).ask(swarm([0.5, -4.0]), factors(2))
    # v / 2 + 2 * 0.5 * (2 - 1) + 1 * 0.25 * (4 - 1), v = 0.5 and -4
    torch.testing.assert_close(moved.velocity, torch.tensor([[2.0, -0.25]]))
    # Between 0.05 and 0.1 of the range of 20.
    moved = slow.ask(swarm([0.5, -4.0]), factors(2))
    torch.testing.assert_close(moved.velocity, torch.tensor([[2.0, -1.0]]))


def test_tell_remembers_the_better_and_keeps_the_earlier_among_equals():
    particles, fives = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.full((4,), 5.0)
    state = swarm([0.0])._replace(
        position=particles,
        best_position=torch.zeros(4, 1),
        best_fitness=fives,
        leader=torch.zeros(1),
        leader_fitness=fives[:1],
    )
    unchanged = ParticleSwarm().tell(state, torch.tensor([5.0, 4.0, -math.inf, -math.inf]))
    assert torch.equal(unchanged.best_position, state.best_position)
    assert torch.equal(unchanged.leader, state.leader)
    told = ParticleSwarm().tell(state, torch.tensor([-math.inf, 6.0, 7.0, 7.0]))
    assert told.best_position.flatten().tolist() == [0.0, 2.0, 3.0, 4.0]
    assert told.best_fitness.tolist() == [5.0, 6.0, 7.0, 7.0]
    assert (told.leader.tolist(), told.leader_fitness.tolist()) == ([3.0], [7.0])


def first_positions(
    original: Tensor, particles: int = 9, elites: Tensor | None = None, **settings: Any
) -> Tensor:
    searcher = ParticleSwarm(particles=particles, **settings)
    elites = original.new_zeros(0, len(original)) if elites is None else elites
    return searcher.init(SearchOrigin(original, SPREAD, elites), RandomStream(0)).position


@pytest.mark.parametrize(
    ("kind", "at_original", "near"), [("local", 1, 8), ("half", 1, 4), ("paper", 5, 0)]
)
def test_where_particles_start(kind, at_original, near):
    centre = torch.tensor([0.5, -1.5, 2.0])
    position = first_positions(centre, start=kind, scale_min=1e-6, scale_max=1e-6)
    distance = (position - centre).abs().amax(1)
    assert (distance[:at_original] == 0).all()
    around = distance[at_original : at_original + near]
    assert ((around > 0) & (around < 1e-4)).all()
    assert (distance[at_original + near :] > 0.1).all()


def test_local_scales_are_spread_on_a_logarithmic_scale():
    position = first_positions(torch.zeros(20_000), 5, scale_min=0.01, scale_max=10.0)
    expected = 2.0 * torch.tensor([0.0, 0.01, 0.1, 1.0, 10.0])
    torch.testing.assert_close(position.std(1), expected, rtol=0.05, atol=0)


def test_elites_follow_the_original_weights():
    start = torch.tensor([1.0, 0.0])
    elites = torch.tensor([[3.0, 4.0], [1.0, -2.0]])
    position = first_positions(start, 15, elites, scale_min=1e-6, scale_max=1e-6)
    assert torch.equal(position[:3], torch.cat([start[None], elites]))
    torch.testing.assert_close(position[3:], start.expand(12, 2), rtol=0, atol=1e-4)
    assert (position[3:] != start).any(1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParticleSwarm(inertia=-0.1), "ParticleSwarm.inertia=-0.1"),
        (lambda: ParticleSwarm(social="2"), "ParticleSwarm.social='2'"),
        (
            lambda: ParticleSwarm(min_speed=0.3),
            "min_speed=0.3` and `max_speed=0.2` are not a range",
        ),
        (lambda: ParticleSwarm(max_speed=0), "min_speed=0.0` and `max_speed=0` are not a range"),
        (lambda: ParticleSwarm(start="locale"), "did you mean 'local'"),
        (lambda: ParticleSwarm(constants="clark"), "did you mean 'clerc'"),
        (lambda: ParticleSwarm(particles=1), "`ParticleSwarm.particles=1`"),
        (lambda: ParticleSwarm(iterations=-1), "`ParticleSwarm.iterations=-1`"),
        (lambda: ParticleSwarm(patience=0), "`ParticleSwarm.patience=0`"),
        (lambda: ParticleSwarm(scale_min="small"), "`ParticleSwarm.scale_min='small'`"),
        (lambda: ParticleSwarm(scale_min=2.0), "`scale_max=0.3`"),
        (lambda: DifferentialEvolution(population=3), "population"),
        (lambda: DifferentialEvolution(crossover=1.5), "crossover"),
        (lambda: DifferentialEvolution(factor_min=2.0), "factor_min"),
        (lambda: DifferentialEvolution(reach=0.5), "reach"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ConfigurationError, match="HINT: ") as error:
        make()
    assert message in str(error.value)
