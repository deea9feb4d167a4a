import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.search.pso import ParticleSwarm, Swarm
from lightning_nrl.search.searcher import RandomStreams, SearchOrigin, WeightStats, search_dtype

CPU = torch.device("cpu")
SPREAD = WeightStats(mean=5.0, std=2.0, lowest=-1.0, highest=9.0)


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
    dtype = search_dtype(original.dtype)
    return how.init(SearchOrigin(original.to(dtype), stats, elites, searched), streams)


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


def begin(kind="local", particles=9, seeds=(0,), original=None, sizes=None, **changes):
    original = torch.tensor([[0.5, -1.5, 2.0]]).repeat(len(seeds), 1) if original is None else original
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inertia": -0.1}, "inertia=-0.1"),
        ({"cognitive": math.nan}, "cognitive=nan"),
        ({"social": "2"}, "social='2'"),
        ({"min_speed": 0.3}, "min_speed=0.3` does not go with `max_speed=0.2"),
        ({"max_speed": 0}, "min_speed=0.0` does not go with `max_speed=0`"),
    ],
)
def test_coefficients_are_checked(changes, words):
    with pytest.raises(ConfigurationError, match=f"ParticleSwarm.{words}"):
        ParticleSwarm(**changes)


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
    assert moved.position[0, 0, 1] == 1
    assert moved.velocity[0, 0, 1] == 0
    assert moved.position[0, 0, 0] != 1


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
    assert told.leader.tolist() == [[3.0]]
    assert told.leader_fitness.tolist() == [7.0]


@pytest.mark.parametrize(
    ("kind", "at_original", "near"),
    [("local", 1, 8), ("half", 1, 4), ("paper", 5, 0)],
)
def test_where_particles_start(kind, at_original, near):
    position = begin(kind, scale_min=1e-6, scale_max=1e-6).position[0]
    distance = (position - torch.tensor([0.5, -1.5, 2.0])).abs().amax(1)
    assert (distance[:at_original] == 0).all()
    assert (distance[at_original : at_original + near] > 0).all()
    assert (distance[at_original : at_original + near] < 1e-4).all()
    assert (distance[at_original + near :] > 0.1).all()


def test_local_scales_are_spread_on_a_logarithmic_scale():
    near = begin(particles=5, original=torch.zeros(1, 20_000), scale_min=0.01, scale_max=10.0).position[0]
    torch.testing.assert_close(near.std(1), 2.0 * torch.tensor([0.0, 0.01, 0.1, 1.0, 10.0]), rtol=0.05, atol=0)


def test_spread_may_differ_from_weight_to_weight_and_from_swarm_to_swarm():
    std = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    spread = WeightStats(mean=torch.zeros(3), std=std, lowest=0.0, highest=torch.ones(2, 1))
    state = start(torch.ones(2, 3), spread, ParticleSwarm(particles=4), RandomStreams.seeded((0, 0)))
    moved = (state.position[:, 1:] != 1).all(1)
    assert moved.tolist() == [[False, True, True], [True, False, False]]
    assert ParticleSwarm(particles=4).ask(state, RandomStreams.seeded((0, 0))).position.shape == (2, 4, 3)


@given(
    kind=st.sampled_from(["local", "half", "paper"]),
    constants=st.sampled_from(["clerc", "arachne"]),
    seed=st.integers(0, 2**40),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_elite_and_padding_never_move_and_a_swarm_does_what_it_does_alone(kind, constants, seed, sizes):
    how = ParticleSwarm(particles=7, start=kind, constants=constants)
    original = torch.randn(len(sizes), 5, generator=torch.Generator().manual_seed(seed))
    seeds = [seed + s for s in range(len(sizes))]

    def run(rows, sizes):
        streams = RandomStreams.seeded([seeds[s] for s in rows], sizes)
        state = start(original[list(rows), : max(sizes)], SPREAD, how, streams)
        for _ in range(4):
            state = how.ask(how.tell(state, -state.position[..., 0].square()), streams)
        return state

    together = run(range(len(sizes)), sizes)
    for s, size in enumerate(sizes):
        alone = run([s], [size])
        assert torch.equal(together.position[s, :, :size], alone.position[0])
        assert torch.equal(together.leader[s, :size], alone.leader[0])
        assert torch.equal(together.position[s, :, size:], original[s, size : max(sizes)].expand(7, -1))
        if kind != "paper":
            assert torch.equal(together.position[s, 0], original[s, : max(sizes)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "locale"}, "did you mean 'local'"),
        ({"constants": "clark"}, "did you mean 'clerc'"),
        ({"particles": 1}, "`ParticleSwarm.particles=1`"),
        ({"particles": 10.5}, "`ParticleSwarm.particles=10.5`"),
        ({"iterations": -1}, "`ParticleSwarm.iterations=-1`"),
        ({"patience": 0}, "`ParticleSwarm.patience=0`"),
        ({"scale_min": "small"}, "`ParticleSwarm.scale_min='small'`"),
        ({"scale_min": 0.0}, "`ParticleSwarm.scale_min=0.0`"),
        ({"scale_min": 2.0}, "`scale_max=0.3`"),
        ({"scale_max": math.inf}, "`scale_max=inf`"),
    ],
)
def test_bad_settings_are_told(change, message):
    with pytest.raises(ConfigurationError, match="HINT: ") as error:
        replace(ParticleSwarm(), **change)
    assert message in str(error.value)


def test_elites_are_placed_then_the_lines_to_them_then_what_is_around():
    original = torch.tensor([[1.0, 0.0]])
    elites = torch.tensor([[[3.0, 4.0], [1.0, -2.0]]])
    how = ParticleSwarm(particles=15, scale_min=1e-6, scale_max=1e-6)
    placed = start(original, SPREAD, how, RandomStreams.seeded([0]), elites).position[0]
    lines = torch.tensor([[3.3, 4.6], [1.0, -2.3], [2.6, 3.2], [1.0, -1.6], [2.0, 2.0], [1.0, -1.0]])
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
        start(original, SPREAD, ParticleSwarm(particles=8, start=kind), RandomStreams.seeded([0], [2]), given)
        for given in (None, elites)
    )
    assert with_.position.shape == without.position.shape == (1, 8, 3)
    assert torch.equal(with_.position[0, 1:7, :2], elites[0, :, :2])
    assert torch.equal(with_.position[..., 2], original[:, None, 2].expand(1, 8))
