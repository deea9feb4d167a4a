"""Counts and losses: near ties, memory, samples left out, ranks, tasks of the user."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from ranks import Collective
from scoring_networks import REPLAYED, WHOLE, Problem, by_sample, make_problem
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.published.fitnesses import ArachneDEFitness
from lightning_nrl.search import Fitness
from lightning_nrl.search.scores import Scores
from lightning_nrl.tasks import Multiclass, Task

N = 24
FAILED = torch.arange(N) % 3 == 0
ALL = torch.ones(N, dtype=torch.bool)
COUNTS_ONLY = Fitness("eq2")  # uses no losses on I_pos
FITNESSES = (Fitness(), COUNTS_ONLY)


def linear(weight: Tensor, x: Tensor, target: Tensor) -> Problem:
    model = nn.Linear(weight.shape[1], len(weight), bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    return Problem(model.eval(), find_layers(model, ""), (x,), target)


def scored(
    problem: Problem, where: Tensor, values: Tensor, limit: Tensor | None = None, **options: Any
) -> Scores:
    return problem.scorer(where, FAILED, ~FAILED, **options)(values, limit)


def close(actual: Scores, expected: Scores, rows: Any = slice(None)) -> None:
    """Counts are equal, losses up to rounding."""
    assert torch.equal(actual.patched[rows], expected.patched[rows])
    assert torch.equal(actual.intact[rows], expected.intact[rows])
    for a, b in (
        (actual.loss_failed, expected.loss_failed),
        (actual.loss_passed, expected.loss_passed),
    ):
        torch.testing.assert_close(a[rows], b[rows], rtol=1e-5, atol=1e-6)


class OneHot(Multiclass):
    """Truth as one-hot rows."""

    def label(self, target: Tensor) -> Tensor:
        return target.argmax(1)


@pytest.mark.parametrize(
    ("task", "target"),
    [
        (Multiclass(), torch.tensor([1, 1, 0])),
        (Multiclass(), torch.tensor([1, 1, 0], dtype=torch.uint8)),
        (Multiclass(), torch.tensor([1, 1, 0], dtype=torch.int32)),
        (OneHot(), torch.tensor([[0, 1], [0, 1], [1, 0]])),
    ],
    ids=["int64", "uint8", "int32", "one-hot"],
)
def test_by_hand(task, target):
    x = torch.tensor([[2.0, 1.0], [1.0, 3.0], [1.0, 0.0]])
    problem = linear(torch.eye(2), x, target)
    recording = problem.recording(3, evaluator=Evaluator(problem.model, task))
    failed = torch.tensor([True, False, False])
    scorer = problem.scorer(torch.tensor([2]), failed, ~failed, recording=recording)
    scores = scorer(torch.tensor([[0.0], [0.75], [2.0]]))
    # The second logit is x1 + value * x0.
    assert scores.patched.tolist() == [0.0, 1.0, 1.0]
    assert scores.intact.tolist() == [2.0, 2.0, 1.0]
    assert (scores.n_failed, scores.n_passed) == (1, 2)
    # Second minus first logit of each sample.
    gaps = torch.tensor([[-1.0, 0.5, 3.0], [2.0, 2.75, 4.0], [-1.0, -0.25, 1.0]])
    torch.testing.assert_close(scores.loss_failed, F.softplus(-gaps[0]))
    passed = (F.softplus(-gaps[1]) + F.softplus(gaps[2])) / 2
    torch.testing.assert_close(scores.loss_passed, passed)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(2, 6), st.sampled_from(FITNESSES))
def test_small_whole_numbers_are_exact_down_to_ties(seed, k, classes, fitness):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (classes, 4), generator=g).float()
    x = torch.randint(-2, 3, (N, 4), generator=g).float()
    problem = linear(weight, x, torch.randint(0, classes, (N,), generator=g))
    where = torch.randperm(weight.numel(), generator=g)[:k]
    values = torch.randint(-2, 3, (6, len(where)), generator=g).float()
    hits = problem.oracle(where, values).argmax(2) == problem.target
    scores = scored(problem, where, values, fitness=fitness)
    assert scores.patched.tolist() == hits[:, FAILED].sum(1).tolist()
    assert scores.intact.tolist() == hits[:, ~FAILED].sum(1).tolist()


@pytest.mark.parametrize("budget", [1, 10_000])
@pytest.mark.parametrize("name", ["head", "middle linear", "residual, both", "called twice"])
def test_any_budget_gives_the_same(name, budget):
    problem = make_problem(WHOLE[name][0] if name in WHOLE else REPLAYED[name], n=N)
    with pytest.warns(UserWarning, match="whole model") if name in WHOLE else nullcontext():
        recording = problem.recording(7, 17)
    arguments = problem, *problem.candidates(9, 6)
    tight = scored(*arguments, recording=recording, budget=budget)
    close(tight, scored(*arguments, recording=recording, budget=1 << 30))


def test_out_of_memory_halves_the_block_and_carries_on():
    problem = make_problem(REPLAYED["middle linear"], n=N)
    where, values = problem.candidates(9, 6)
    scorer = problem.scorer(where, FAILED, ~FAILED)
    expected = scorer(values)
    sizes = []

    def hold_few(module: nn.Module, inputs: Any) -> None:
        sizes.append(len(inputs[0]))
        if sizes[-1] > 8:
            raise torch.OutOfMemoryError("out of memory")

    problem.model[-1].register_forward_pre_hook(hold_few)
    close(scorer(values), expected)
    assert max(sizes) > 8


class TwoRanks(Collective):
    """Adds what another rank, simulated here, has to add."""

    def sum(self, x: Tensor) -> Tensor:
        return x + x


def test_counts_are_sums_over_ranks_and_one_without_samples_adds_nothing():
    problem = make_problem(REPLAYED["head"], n=N)
    arguments = problem, *problem.candidates(4, 6)
    alone = scored(*arguments)
    ranks = problem.recording(N, evaluator=Evaluator(problem.model, collective=TwoRanks()))
    together = scored(*arguments, recording=ranks)
    assert torch.equal(together.patched, 2 * alone.patched)
    assert together.n_failed == 16
    torch.testing.assert_close(together.loss_failed, alone.loss_failed)
    scores = scored(*arguments, recording=problem.recording(N, keep=~ALL))
    assert (scores.patched.tolist(), scores.loss_passed.tolist()) == ([0.0] * 4, [0.0] * 4)


@pytest.mark.parametrize("name", ["head", "middle linear", "conv2d"])
def test_candidates_that_are_not_numbers_have_no_finite_loss(name):
    problem = make_problem(REPLAYED[name], n=N)
    where, values = problem.candidates(3, 6)
    values[1, 0], values[2] = torch.nan, 1e30
    scores = scored(problem, where, values)
    logits = problem.oracle(where, values)
    expected = torch.stack([F.cross_entropy(x[FAILED], problem.target[FAILED]) for x in logits])
    assert scores.loss_failed.isnan().tolist() == expected.isnan().tolist()
    assert scores.loss_failed[0].isfinite()


class Positive(Task):
    """A task of the user's: right is a first output of at least 0."""

    def passed(self, output: Tensor, target: Any) -> Tensor:
        return output[:, 0] >= 0

    def loss(self, output: Tensor, target: Any) -> Tensor:
        return (output[:, 0] - target).square()


@pytest.mark.parametrize("name", ["head", "middle linear"])
def test_tasks_of_the_user_see_outputs_and_targets(name):
    wanted = torch.linspace(-1, 1, N)
    problem = replace(make_problem(REPLAYED[name], n=N), target=wanted)
    recording = problem.recording(N, evaluator=Evaluator(problem.model, Positive()))
    where, values = problem.candidates(5, 6)
    scores = scored(problem, where, values, recording=recording)
    first = problem.oracle(where, values)[..., 0]
    assert scores.patched.tolist() == (first >= 0)[:, FAILED].sum(1).tolist()
    expected = (first - wanted).square()[:, ~FAILED].mean(1)
    torch.testing.assert_close(scores.loss_passed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["head", "middle linear", "residual, both"])
@pytest.mark.parametrize("options", [{}, {"fitness": COUNTS_ONLY}, {"weight": 1.0 + ALL}], ids=str)
def test_only_who_breaks_more_than_told_is_given_up(name, options, monkeypatch):
    monkeypatch.setattr("lightning_nrl.search.scoring.scorer.N_MOST_FRAGILE", 4)
    problem = make_problem(REPLAYED[name], n=N)
    arguments = problem, *problem.candidates(9, 12)
    full = scored(*arguments, **options)
    broken = full.n_passed - full.intact if full.cost is None else full.cost
    limit = broken.clone()
    limit[::2] -= 1  # every second candidate breaks one too many
    fragility = torch.rand(N, generator=torch.Generator().manual_seed(0))
    scores = scored(*arguments, limit, fragility=fragility, **options)
    assert torch.equal(scores.loss_failed.isnan(), torch.arange(9) % 2 == 0)
    close(scores, full, torch.arange(9) % 2 == 1)


class Logits(Multiclass):
    """What any task with margins can do; scoring knows no short cut for it."""

    def passed(self, output: Tensor, target: Tensor) -> Tensor:
        return super().passed(output, target)


@pytest.mark.parametrize("fitness", FITNESSES)
@pytest.mark.parametrize("task", [Multiclass(), Logits()], ids=["short cut", "any"])
def test_a_sample_passes_while_it_keeps_its_reserve(task, fitness):
    problem = make_problem(REPLAYED["head"], n=N)
    where, values = problem.candidates(3, 6)
    reserve = torch.rand(N, generator=torch.Generator().manual_seed(0))
    recording = problem.recording(N, evaluator=Evaluator(problem.model, task))
    options = {"recording": recording, "fitness": fitness}
    plain = scored(problem, where, values, **options)
    kept = scored(problem, where, values, **options, reserve=reserve)
    logits = problem.oracle(where, values)
    hits = torch.stack([Multiclass().margin(x, problem.target) > reserve for x in logits])
    patched, intact = hits[:, FAILED].sum(1).float(), hits[:, ~FAILED].sum(1).float()
    close(kept, replace(plain, patched=patched, intact=intact))
    assert (kept.intact < plain.intact).any()


@pytest.mark.parametrize("budget", [None, 4_000], ids=["roomy", "tight"])
@pytest.mark.parametrize("name", ["head", "middle linear"])
def test_credits_of_wrong_samples_by_their_loss_and_weights(name, budget):
    problem = make_problem(REPLAYED[name], n=N)
    where, values = problem.candidates(9, 6)
    weight = torch.arange(N, dtype=torch.float64) / 8
    scorer = problem.scorer(
        where, FAILED, ~FAILED, budget=budget, fitness=ArachneDEFitness(), weight=weight
    )
    scores = scorer(values)
    rows, passed, losses = by_sample(scorer, values)
    credit = torch.where(passed, 1.0, 1 / (losses + 1))
    is_failed, weight = FAILED[rows], weight[rows]
    for actual, expected in (
        (scores.credit_failed, credit[:, is_failed]),
        (scores.credit_passed, credit[:, ~is_failed]),
        (scores.value, (weight * passed)[:, is_failed]),
        (scores.cost, (weight * ~passed)[:, ~is_failed]),
        (8 * scores.loss_failed, (weight * losses)[:, is_failed]),
    ):
        torch.testing.assert_close(actual.double(), expected.sum(1))
