import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.published import ArachneDEFitness, ArachneFitness, NeuRecoverFitness
from lightning_nrl.search import FITNESSES, FitnessFunction
from lightning_nrl.search.fitness import FEASIBLE_FLOOR, Fitness
from lightning_nrl.search.scores import Scores


def scores(patched, intact, loss_failed, loss_passed, n_failed=4, n_passed=10):
    columns = torch.tensor([patched, intact, loss_failed, loss_passed], dtype=torch.float64)
    return Scores(*columns, n_failed=n_failed, n_passed=n_passed)


def close(value, expected, **tolerance):
    torch.testing.assert_close(value, torch.tensor(expected).double(), **tolerance)


BEFORE = scores([0], [10], [2.0], [0.5])
AFTER = scores([1, 4], [10, 9], [1.0, 0.0], [0.75, 1.0])
"""Two candidates: 1 of 4 repaired, none of 10 broken, losses 2 -> 1 and 1/2 -> 3/4; and 4, 1, 2 ->
0, 1/2 -> 1.
"""


@pytest.mark.parametrize(
    ("loss_term", "failed", "passed"),
    [
        ("bounded", [1 - 1.5 / 2.5, 1 - 0.5 / 2.5], [1 - 1.25 / 1.0, 1 - 1.5 / 1.0]),
        ("inverse_ratio", [2.5 / 1.5, 2.5 / 0.5], [1.0 / 1.25, 1.0 / 1.5]),
        ("as_printed", [1.5 / 2.5, 0.5 / 2.5], [1.25 / 1.0, 1.5 / 1.0]),
    ],
)
def test_equations_by_hand(loss_term, failed, passed):
    eq1 = Fitness("eq1", alpha=6, delta=0.5, loss_term=loss_term)(AFTER, BEFORE)
    eq2 = Fitness("eq2", alpha=6, delta=0.5, beta=0.25, loss_term=loss_term)(AFTER, BEFORE)
    counts = [1 / 4 + 6 * 10 / 10, 4 / 4 + 6 * 9 / 10]
    close(eq1, [counts[0] + failed[0] + passed[0], counts[1] + failed[1] + passed[1]])
    close(eq2, [counts[0] + 0.25 * failed[0], counts[1] + 0.25 * failed[1]])


def test_lexicographic_by_hand():
    value = Fitness(delta=0.5)(AFTER, BEFORE)
    # Losses of all 14 samples: 4 * 2 + 10 * 1/2 = 13 before, 4 * 1 + 10 * 3/4 = 11.5 and 4 * 0 + 10
    # * 1 = 10 after.
    fall = [(13 - 11.5) / (13 + 14 * 0.5), (13 - 10) / (13 + 14 * 0.5)]
    loss = [0.25 * (1 + f / (1 + f)) for f in fall]
    close(value, [1 + loss[0], 4 + loss[1] - 1 * 5])


def test_under_perfect_intact_a_candidate_that_breaks_is_worth_less_than_any_that_does_not():
    # Loss of I_neg 2 -> 162.001 and 2 -> 322.002: the terms are -79.96 and -159.92 (d = 1e-3), a
    # quarter of them against alpha = 8: -11.99 and -31.98. The third breaks one.
    after = scores([0, 0, 4], [10, 10, 9], [162.00095, 322.00195, 0.0], [0.5, 0.5, 0.5])
    plain = Fitness("eq2", alpha=8)(after, BEFORE)
    close(plain[:2], [8 - 19.99, 8 - 39.98], rtol=1e-4, atol=0)
    strict = Fitness("eq2", alpha=8, perfect_intact=True, infeasible="zero")
    value = strict(after, BEFORE)
    raised = [2**-20 / (2**-9 + 11.99), 2**-20 / (2**-9 + 31.98)]
    close(value[:2], raised, rtol=1e-4, atol=0)
    assert value.tolist() == sorted(value.tolist(), reverse=True)
    assert value[2] == 0
    assert strict(AFTER, BEFORE)[0] == Fitness("eq2", alpha=8)(AFTER, BEFORE)[0]


def test_perfect_intact_ranked_orders_the_infeasible_below_the_feasible():
    candidates = scores(
        # none broken with a terrible loss; 1 broken; 1 broken and fewer repaired; the same and a
        # higher loss; 2 broken
        patched=[0, 2, 1, 1, 4],
        intact=[10, 9, 9, 9, 8],
        loss_failed=[1e12, 1.0, 1.0, 3.0, 0.0],
        loss_passed=[1e12, 0.5, 0.5, 0.5, 0.0],
    )
    for kind in ("eq1", "eq2", "lexicographic"):
        value = Fitness(kind, perfect_intact=True)(candidates, BEFORE)
        assert (value.diff() < 0).all(), kind
    assert Fitness("eq1", perfect_intact=True)(candidates, BEFORE)[0] == FEASIBLE_FLOOR


@pytest.mark.parametrize("infeasible", ["ranked", "zero"])
@pytest.mark.parametrize("loss_term", ["bounded", "as_printed", "inverse_ratio"])
@pytest.mark.parametrize("kind", ["eq1", "eq2", "lexicographic"])
def test_a_loss_that_is_not_finite_is_worst_of_all(kind, loss_term, infeasible):
    candidates = scores([4, 4, 0], [10, 10, 0], [math.nan, 1.0, 9.0], [0.1, math.inf, 9.0])
    fitness = Fitness(kind, loss_term=loss_term, perfect_intact=True, infeasible=infeasible)
    value = fitness(candidates, BEFORE)
    assert value[:2].tolist() == [-math.inf, -math.inf]
    assert value[2].isfinite()


N = 10**6
candidate = st.tuples(st.integers(0, N), st.integers(0, N), st.floats(0, 1e4))


@given(st.lists(candidate, min_size=2, max_size=8), st.floats(0, 100))
@settings(max_examples=200, deadline=None)
def test_lexicographic_numbers_compare_as_the_tuples_do(candidates, loss_before):
    broken, repaired, loss = zip(*candidates, strict=True)
    after = scores(repaired, [N - b for b in broken], loss, loss, n_failed=N, n_passed=N)
    before = scores([0], [N], [loss_before], [1.0], n_failed=N, n_passed=N)
    value = Fitness()(after, before).tolist()
    for (b1, r1, l1), v1 in zip(candidates, value, strict=True):
        assert (v1 > 0) == (b1 == 0)
        for (b2, r2, l2), v2 in zip(candidates, value, strict=True):
            if (b1, -r1) != (b2, -r2):
                assert ((b1, -r1) < (b2, -r2)) == (v1 > v2)
            elif l1 < l2:
                assert v1 >= v2


@pytest.mark.parametrize(
    ("arguments", "problem", "hint"),
    [
        ({"kind": "lexicografic"}, "`fitness.kind='lexicografic'`", "did you mean 'lexicographic'"),
        ({"infeasible": None}, "`fitness.infeasible=None`", "'ranked', 'zero'"),
        ({"alpha": "6"}, "`fitness.alpha='6'`", "at least 0"),
        ({"beta": math.nan}, "`fitness.beta=nan`", "at least 0"),
        ({"delta": 0.0}, "`fitness.delta=0.0`", "above 0"),
        ({"tolerated": -1}, "`fitness.tolerated=-1`", "at least 0"),
    ],
)
def test_bad_arguments_are_told(arguments, problem, hint):
    with pytest.raises(ConfigurationError) as error:
        Fitness(**arguments)
    told_problem, _, told_hint = str(error.value).partition("\nHINT: ")
    assert problem in told_problem
    assert hint in told_hint


@pytest.mark.parametrize("kind", ["lexicographic", "eq1", "eq2"])
@pytest.mark.parametrize("perfect_intact", [False, True])
@pytest.mark.parametrize("infeasible", ["ranked", "zero"])
def test_says_when_the_loss_of_passed_samples_does_not_matter(kind, perfect_intact, infeasible):
    fitness = Fitness(kind, perfect_intact=perfect_intact, infeasible=infeasible)
    worse = replace(AFTER, loss_passed=AFTER.loss_passed + 1)
    assert torch.equal(fitness(AFTER, BEFORE), fitness(worse, BEFORE)) != fitness.uses_passed_loss


row = st.tuples(st.integers(0, 4), st.integers(0, 10), st.floats(0, 50), st.floats(0, 50))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["lexicographic", "eq1", "eq2"]),
    st.booleans(),
    st.sampled_from(["ranked", "zero"]),
    st.integers(0, 5),
    row,
    row,
)
def test_who_breaks_more_than_the_most_is_worth_no_more(
    kind, perfect_intact, infeasible, tolerated, best, challenger
):
    fitness = Fitness(
        kind, perfect_intact=perfect_intact, infeasible=infeasible, tolerated=tolerated
    )
    value = fitness(scores(*([x] for x in best)), BEFORE)
    limit = fitness.most_broken(value, 4)
    if limit is not None and 10 - challenger[1] > limit.item():
        assert fitness(scores(*([x] for x in challenger)), BEFORE) <= value


def test_what_a_gate_allows_to_break_costs_nothing():
    # One of ten broken is tolerated: the second candidate repairs more, and is feasible.
    free = Fitness(delta=0.5, tolerated=1)(AFTER, BEFORE)
    torch.testing.assert_close(free[1], Fitness(delta=0.5)(AFTER, BEFORE)[1] + 5)
    two_broken = scores([4], [8], [0.0], [1.0])
    for kind in ("lexicographic", "eq1", "eq2"):
        strict, free = (Fitness(kind).as_constraint(n) for n in (0, 1))
        assert strict(AFTER, BEFORE).argmax() == 0
        assert free(AFTER, BEFORE).argmax() == 1
        assert free(two_broken, BEFORE) < free(scores([0], [9], [2.0], [0.5]), BEFORE)


# AFTER: 1 of 4 repaired, 10 of 10 kept, losses 1 and 3/4; and 4, 9, losses 0 and 1.


def test_the_published_by_hand():
    close(ArachneFitness()(AFTER, BEFORE), [2 / 2 + 11 / 1.75, 5 / 1 + 10 / 2])
    expected = [1.25 / 2 + 3 * 2 / 1.75, 2 / 1 + 3 * 1.9 / 2]
    close(NeuRecoverFitness(alpha=3)(AFTER, BEFORE), expected)
    credits = torch.tensor([[1.5, 4.0], [10.0, 9.5]])
    with_credit = replace(AFTER, credit_failed=credits[0], credit_passed=credits[1])
    assert ArachneDEFitness()(with_credit, BEFORE).tolist() == [25.0, 49.5]
    assert ArachneDEFitness(aggressiveness=1)(with_credit, BEFORE).tolist() == [11.5, 13.5]
    with pytest.raises(ValueError, match="no credits"):
        ArachneDEFitness()(AFTER, BEFORE)


def test_weights_of_samples_count_and_losses_that_are_no_numbers_do_not():
    weighted = replace(AFTER, value=torch.tensor([2.0, 4.0]), cost=torch.tensor([3.0, 1.0]))
    close(ArachneFitness()(weighted, BEFORE), [3 / 2 + 8 / 1.75, 5 / 1 + 10 / 2])
    not_finite = scores([1, 4], [10, 9], [math.nan, 0.0], [1.0, math.inf])
    for fitness in (ArachneFitness(), NeuRecoverFitness()):
        assert fitness(not_finite, BEFORE).tolist() == [-math.inf, -math.inf]


class Balance(FitnessFunction):
    def __call__(self, scores: Scores, original: Scores) -> torch.Tensor:
        return scores.patched + scores.intact


def test_a_fitness_of_ones_own_has_defaults():
    fitness = Balance()
    assert fitness.uses_passed_loss
    assert fitness.credit(torch.ones(1, 1) > 0, torch.ones(1, 1)) is None
    assert fitness.most_broken(torch.zeros(1), 4) is None
    assert fitness.as_constraint(1.0) is fitness
    assert FITNESSES.parse("fitness", fitness) is fitness
