import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import WIDE, N, Quitting, first_weight, original, same, sphere, wall

from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import ConfigurationError, EvaluationError
from lightning_nrl.search import Fitness, ParticleSwarm, search, search_many
from lightning_nrl.search.scores import Scores


@pytest.mark.parametrize("start", ["local", "half", "paper"])
def test_finds_its_way_back_to_feasibility(start):
    history = search(wall, original()[0], WIDE, searcher=ParticleSwarm(start=start)).history
    assert (history.patched[-1], history.intact[-1]) == (4, N)


def test_history_is_what_was_found():
    result = search(wall, original()[0], WIDE, searcher=ParticleSwarm(iterations=7))
    history, found = result.history, wall(result.values[None, None])
    assert len(history) == 8 == result.iterations + 1
    assert result.stopped == "all 7 iterations were made"
    assert history.patched[-1] == found.patched
    assert history.intact[-1] == found.intact
    assert history.loss_failed[-1] == found.loss_failed
    assert history.loss_passed[-1] == found.loss_passed
    assert history.best[-1] == result.fitness > result.original_fitness == 0.25
    assert result.seconds > 0


def test_history_of_the_starting_swarm_by_hand():
    rows = []

    def scorer(values):
        rows.append(values)
        return sphere(values)

    how = ParticleSwarm(particles=3, iterations=0)
    history = search(
        scorer, original()[0], WIDE, searcher=how, fitness=Fitness("eq2", alpha=0)
    ).history
    (values,) = rows
    loss = values[0].double().square().mean(-1)
    value = 0.25 * (1 - (loss + 1e-3) / (loss[0] + 1e-3))
    torch.testing.assert_close(history.mean, value.mean()[None])
    torch.testing.assert_close(history.best, value.max()[None])
    torch.testing.assert_close(
        history.diversity, values[0].double().std(0, correction=0).mean()[None], rtol=1e-5, atol=0
    )


@given(seed=st.integers(0, 2**32), sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4))
@settings(max_examples=15, deadline=None)
def test_a_swarm_among_many_finds_what_it_finds_alone(seed, sizes):
    kinds = [
        Fitness(),
        Fitness("eq1"),
        Fitness("eq2", perfect_intact=True),
        Fitness("eq1", alpha=4),
    ]
    begin = original(len(sizes), max(sizes), seed)
    fitness = [kinds[s % 4] for s in range(len(sizes))]
    how = ParticleSwarm(particles=6, iterations=12, patience=3)
    seeds = [seed + s // 2 for s in range(len(sizes))]
    together = search_many(
        first_weight, begin, WIDE, seeds=seeds, fitness=fitness, searcher=how, sizes=sizes
    )
    for s, size in enumerate(sizes):
        alone = search(
            first_weight, begin[s, :size], WIDE, fitness=fitness[s], searcher=how, seed=seeds[s]
        )
        assert same(together[s], alone)
        for name in ("mean", "diversity"):
            curves = (getattr(result.history, name) for result in (together[s], alone))
            torch.testing.assert_close(*curves, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interval", [2, 7, 10, 100])
@pytest.mark.parametrize("patience", [1, 3, 10])
def test_the_stop_rule_is_exact_however_seldom_the_host_looks(interval, patience):
    how = ParticleSwarm(particles=5, iterations=40, patience=patience)
    arguments = {"seeds": range(4), "searcher": how}
    each = search_many(wall, original(4), WIDE, **arguments)
    seldom = search_many(wall, original(4), WIDE, **arguments, check_every=interval)
    assert all(same(a, b) for a, b in zip(each, seldom, strict=True))
    assert len({result.iterations for result in each}) > 1


def test_stops_after_patience_iterations_without_a_better_fitness():
    calls = []

    def better_until_the_fifth(values):
        calls.append(len(calls))
        step = min(calls[-1], 5)
        loss = torch.full(values.shape[:2], 10.0 - step)
        return Scores(torch.zeros_like(loss), torch.full_like(loss, N), loss, loss, N, N)

    result = search(better_until_the_fifth, original()[0], WIDE, searcher=ParticleSwarm(patience=4))
    assert result.iterations == 9
    assert len(calls) == 10
    assert result.stopped == "no better fitness in 4 iterations"
    assert result.history.best.argmax() == 5


def test_nothing_better_gives_the_original_bit_for_bit():
    def flat(values):
        same = torch.ones(values.shape[:2])
        return Scores(same, same, same, same, N, N)

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        begin = (original()[0] / 3).to(dtype)
        result = search(flat, begin, WIDE, searcher=ParticleSwarm(start="paper", patience=20))
        assert result.values.dtype == dtype
        assert torch.equal(result.values, begin)
        assert (result.iterations, result.fitness) == (20, result.original_fitness)


def test_candidates_with_nan_losses_rank_last():
    def scorer(values):
        scores = sphere(values)
        loss = scores.loss_failed.where(values[..., 0] > 0.5, math.nan)
        return Scores(scores.patched, scores.intact, loss, scores.loss_passed, N, N)

    result = search(scorer, original()[0], WIDE)
    assert result.values[0] > 0.5
    assert result.fitness > result.original_fitness
    assert result.history.mean.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_original_without_a_finite_loss_is_refused(value):
    def scorer(values):
        scores = sphere(values)
        return Scores(
            scores.patched, scores.intact, scores.loss_failed, scores.loss_passed * value, N, N
        )

    with pytest.raises(EvaluationError, match="HINT"):
        search(scorer, original()[0], WIDE)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (ParticleSwarm(iterations=25, patience=100), [10, 20, 25]),
        (ParticleSwarm(iterations=20, patience=100), [10, 20]),
        (ParticleSwarm(iterations=0), [0]),
    ],
)
@pytest.mark.parametrize("interval", [1, 10])
def test_progress_is_told_every_tenth_iteration_and_at_the_end(how, told, interval):
    heard = []
    arguments = {"searcher": how, "check_every": interval}
    result = search(
        sphere, original()[0], WIDE, **arguments, on_progress=lambda *x: heard.append(x)
    )
    assert [done for done, _ in heard] == told
    assert [len(history) for _, history in heard] == [done + 1 for done in told]
    assert torch.equal(heard[-1][1].best, result.history.best)


def test_no_gradient_is_recorded_and_the_global_random_state_is_left_alone():
    weight = original()[0].requires_grad_()
    before = torch.get_rng_state()
    result = search(sphere, weight, WIDE, searcher=ParticleSwarm(iterations=3))
    assert not result.values.requires_grad
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [0]}, "`seeds` has 1 entries for 2 searches"),
        ({"fitness": [Fitness()] * 3}, "`fitness` has 3 entries for 2 searches"),
        ({"sizes": [1]}, "`sizes` has 1 entries for 2 searches"),
    ],
)
def test_arguments_that_do_not_fit_are_told(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        search_many(sphere, original(2), WIDE, **{"seeds": [0, 1], **arguments})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_host_waits_for_the_device_once_in_ten_iterations():
    scored, looks = [], []

    def scorer(values):
        scored.append(len(values))
        if len(scored) - 1 in (10, 20, 25):
            torch.cuda.set_sync_debug_mode("default")
        return sphere(values)

    def now():
        looks.append(len(scored) - 1)
        if looks[-1] < 25:
            torch.cuda.set_sync_debug_mode("error")
        return 0.0

    try:
        results = search_many(
            scorer,
            original(2).cuda(),
            WIDE,
            seeds=[0, 1],
            fitness=[Fitness(), Fitness("eq2", perfect_intact=True)],
            sizes=[4, 3],
            searcher=ParticleSwarm(iterations=25, patience=100),
            deadline=Deadline(end=1.0, now=now),
            on_progress=print,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert looks == [0, 10, 20, 25]
    assert all(result.values.is_cuda for result in results)


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
    arguments = {
        "fitness": fitness,
        "searcher": ParticleSwarm(particles=12, iterations=40, start="half"),
        "seed": seed,
    }
    quitting = Quitting()
    assert same(
        search(quitting, original()[0], WIDE, **arguments),
        search(wall, original()[0], WIDE, **arguments),
    )
    assert (quitting.given_up > 0) == (fitness.most_broken(torch.zeros(1, 1), 4) is not None)


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 4),
    kind=st.sampled_from(["lexicographic", "eq1", "eq2"]),
)
@settings(max_examples=25, deadline=None)
def test_nothing_is_worth_less_than_an_elite(seed, n, kind):
    begin = original(seed=seed)[0]
    elites = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    fitness = Fitness(kind)
    scores = wall(torch.cat([begin[None], elites])[None])
    before = wall(begin[None, None])
    worth = fitness(scores, before).max()
    for iterations in (0, 5):
        how = ParticleSwarm(particles=6, iterations=iterations)
        result = search(wall, begin, WIDE, searcher=how, fitness=fitness, seed=seed, elites=elites)
        assert result.fitness >= worth
        assert (result.history.best.diff() >= 0).all()
        found = fitness(wall(result.values[None, None]), before)
        assert found.item() == pytest.approx(result.fitness)


@pytest.mark.parametrize("asked", [0, 3])
def test_a_search_ends_when_its_time_is_over(asked):
    deadline = Deadline(end=asked, now=itertools.count().__next__)
    result = search(wall, original()[0], WIDE, deadline=deadline)
    assert (result.iterations, result.stopped) == (asked, "time was over")


@pytest.mark.parametrize(
    "fitness", [Fitness(), Fitness("eq1"), [Fitness(), Fitness("eq1"), Fitness("eq2"), Fitness()]]
)
def test_a_swarm_that_is_over_is_scored_no_more(fitness):
    how, scorer = ParticleSwarm(particles=5, iterations=40, patience=2), Quitting()
    arguments = {"seeds": range(4), "searcher": how, "fitness": fitness}
    given_up = search_many(scorer, original(4), WIDE, **arguments)
    in_full = search_many(wall, original(4), WIDE, **arguments)
    assert all(same(a, b) for a, b in zip(given_up, in_full, strict=True))
    ends = [result.iterations for result in in_full]
    assert min(ends) < max(ends)
    scored = [sum(over[s] for over in scorer.over) for s in range(4)]
    assert scored == [max(ends) - end for end in ends]


def test_a_default_device_of_the_user_s_makes_no_difference():
    arguments = {
        "seeds": [0, 1],
        "sizes": [4, 3],
        "searcher": ParticleSwarm(particles=6, iterations=12),
    }
    elites, fitness = torch.ones(2, 2, 4), [Fitness(), Fitness("eq1")]
    expected = search_many(wall, original(2), WIDE, **arguments, elites=elites, fitness=fitness)
    begin = original(2)
    with torch.device("meta"):
        found = search_many(wall, begin, WIDE, **arguments, elites=elites, fitness=fitness)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
