import itertools
import math

import pytest
import torch
from searches import WIDE, N, Plain, Quitting, original, same, sphere, wall
from toy_problems import Deadline

from lightning_nrl.errors import EvaluationError
from lightning_nrl.search import Fitness, ParticleSwarm, search
from lightning_nrl.search.scores import Scores


@pytest.mark.parametrize("start", ["local", "half", "paper"])
def test_finds_its_way_back_to_feasibility(start):
    history = search(wall, original(), WIDE, searcher=ParticleSwarm(start=start)).history
    assert (history.patched[-1], history.intact[-1]) == (4, N)


def test_history_is_what_was_found():
    result = search(wall, original(), WIDE, searcher=ParticleSwarm(iterations=7))
    history, scores = result.history, wall(result.values[None])
    assert len(history) == 8 == result.iterations + 1
    assert result.stopped == "all 7 iterations were made"
    assert history.patched[-1] == scores.patched
    assert history.intact[-1] == scores.intact
    assert history.loss_failed[-1] == scores.loss_failed
    assert history.loss_passed[-1] == scores.loss_passed
    assert history.best[-1] == result.fitness > result.original_fitness == 0.25
    assert (history.best.diff() >= 0).all()
    assert result.seconds > 0


def test_history_of_the_starting_swarm_by_hand():
    scorer, swarm = Plain(sphere), ParticleSwarm(particles=3, iterations=0)
    fitness = Fitness("eq2", alpha=0)
    history = search(scorer, original(), WIDE, searcher=swarm, fitness=fitness).history
    (values,) = scorer.seen
    loss = values.double().square().mean(-1)
    value = 0.25 * (1 - (loss + 1e-3) / (loss[0] + 1e-3))
    spread = values.double().std(0, correction=0).mean()[None]
    torch.testing.assert_close(history.mean, value.mean()[None])
    torch.testing.assert_close(history.best, value.max()[None])
    torch.testing.assert_close(history.diversity, spread, rtol=1e-5, atol=0)


def test_stops_after_patience_iterations_without_a_better_fitness():
    def better_until_the_fifth(values):
        loss = torch.full((len(values),), 11.0 - min(len(scorer.seen), 6))
        return Scores(torch.zeros_like(loss), torch.full_like(loss, N), loss, loss, N, N)

    scorer = Plain(better_until_the_fifth)
    result = search(scorer, original(), WIDE, searcher=ParticleSwarm(patience=4))
    assert result.iterations == 9
    assert len(scorer.seen) == 10
    assert result.stopped == "no better fitness in 4 iterations"
    assert result.history.best.argmax() == 5


def test_nothing_better_gives_the_original_bit_for_bit():
    @Plain
    def flat(values):
        ones = torch.ones(len(values))
        return Scores(ones, ones, ones, ones, N, N)

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        begin = (original() / 3).to(dtype)
        result = search(flat, begin, WIDE, searcher=ParticleSwarm(start="paper", patience=20))
        assert result.values.dtype == dtype
        assert torch.equal(result.values, begin)
        assert (result.iterations, result.fitness) == (20, result.original_fitness)


def test_candidates_with_nan_losses_rank_last():
    @Plain
    def scorer(values):
        scores = sphere(values)
        loss = scores.loss_failed.where(values[:, 0] > 0.5, math.nan)
        return Scores(scores.patched, scores.intact, loss, scores.loss_passed, N, N)

    result = search(scorer, original(), WIDE)
    assert result.values[0] > 0.5
    assert result.fitness > result.original_fitness
    assert result.history.mean.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_original_without_a_finite_loss_is_refused(value):
    @Plain
    def scorer(values):
        scores = sphere(values)
        return Scores(
            scores.patched, scores.intact, scores.loss_failed, scores.loss_passed * value, N, N
        )

    with pytest.raises(EvaluationError, match="HINT"):
        search(scorer, original(), WIDE)


@pytest.mark.parametrize(
    ("swarm", "told"),
    [
        (ParticleSwarm(iterations=25, patience=100), [10, 20, 25]),
        (ParticleSwarm(iterations=20, patience=100), [10, 20]),
        (ParticleSwarm(iterations=0), [0]),
    ],
)
def test_progress_is_told_every_tenth_iteration_and_at_the_end(swarm, told):
    calls = []
    result = search(
        sphere,
        original(),
        WIDE,
        searcher=swarm,
        on_progress=lambda done, history: calls.append((done, history)),
    )
    assert [done for done, _ in calls] == told
    assert [len(history) for _, history in calls] == [done + 1 for done in told]
    assert torch.equal(calls[-1][1].best, result.history.best)


def test_no_gradient_is_recorded_and_the_global_random_state_is_left_alone():
    weight = original().requires_grad_()
    before = torch.get_rng_state()
    result = search(sphere, weight, WIDE, searcher=ParticleSwarm(iterations=3))
    assert not result.values.requires_grad
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_host_waits_for_the_device_once_in_ten_iterations():
    looks = []

    def score(values):
        if len(scorer.seen) - 1 in (10, 20, 25):
            torch.cuda.set_sync_debug_mode("default")
        return sphere(values)

    def now():
        looks.append(len(scorer.seen) - 1)
        if looks[-1] < 25:
            torch.cuda.set_sync_debug_mode("error")
        return 0.0

    scorer = Plain(score)
    try:
        result = search(
            scorer,
            original().cuda(),
            WIDE,
            fitness=Fitness("eq2", perfect_intact=True),
            searcher=ParticleSwarm(iterations=25, patience=100),
            deadline=Deadline(end=1.0, clock=now),
            on_progress=print,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert looks == [0, 10, 20, 25]
    assert result.values.is_cuda


@pytest.mark.parametrize(
    "fitness",
    [
        Fitness(),
        Fitness("eq1", perfect_intact=True),
        Fitness("eq2", alpha=8, perfect_intact=True, infeasible="zero"),
        Fitness("eq2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_giving_up_finds_what_finishing_finds(fitness, seed):
    swarm = ParticleSwarm(particles=12, iterations=40, start="half")
    quitting = Quitting(wall)
    early = search(quitting, original(), WIDE, fitness=fitness, searcher=swarm, seed=seed)
    late = search(wall, original(), WIDE, fitness=fitness, searcher=swarm, seed=seed)
    assert same(early, late)
    assert (quitting.given_up > 0) == (fitness.most_broken(torch.zeros(1), 4) is not None)


@pytest.mark.parametrize("n_iterations", [0, 3])
def test_a_search_ends_when_its_time_is_over(n_iterations):
    deadline = Deadline(end=n_iterations, clock=itertools.count().__next__)
    result = search(wall, original(), WIDE, deadline=deadline)
    assert (result.iterations, result.stopped) == (n_iterations, "time was over")


def test_a_default_device_of_the_user_s_makes_no_difference():
    swarm, elites = ParticleSwarm(particles=6, iterations=12), torch.ones(2, 4)
    begin = original()
    expected = search(wall, begin, WIDE, searcher=swarm, elites=elites)
    with torch.device("meta"):
        result = search(wall, begin, WIDE, searcher=swarm, elites=elites)
    assert same(result, expected)
