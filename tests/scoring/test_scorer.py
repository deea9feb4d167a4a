"""Counts and losses: near ties, memory, swarms that differ, samples left out, ranks, tasks of the user."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scoring_networks import REPLAYED, WHOLE, Problem, by_sample, make_problem
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._utils.distributed import Collective
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search._scoring.chunk_scorer import ChunkScorer
from lightning_nrl.search._scoring.recording import record
from lightning_nrl.search._scoring.scorer import make_scorer
from lightning_nrl.search.scores import Scores
from lightning_nrl.tasks import Multiclass, Task

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""

N = 24
FAILED = torch.arange(N) % 3 == 0


def linear(weight: Tensor, x: Tensor, target: list[int]) -> Problem:
    model = nn.Linear(weight.shape[1], len(weight), bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    return Problem(model.eval(), find_layers(model, ""), (x,), torch.tensor(target))


def test_by_hand() -> None:
    problem = linear(torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 3.0], [1.0, 0.0]]), [1, 1, 0])
    failed = torch.tensor([True, False, False])
    scorer = make_scorer(problem.recording(3), torch.tensor([2]), failed, ~failed, EVALUATOR)
    scores = scorer(torch.tensor([[[0.0], [0.75], [2.0]]]))  # second logit: x1 + value * x0
    assert scores.patched.tolist() == [[0.0, 1.0, 1.0]]
    assert scores.intact.tolist() == [[2.0, 2.0, 1.0]]
    gaps = torch.tensor([-1.0, 0.5, 3.0])  # second minus first logit of the failed sample
    torch.testing.assert_close(scores.loss_failed[0], F.softplus(-gaps))
    passed = (F.softplus(-torch.tensor([2.0, 2.75, 4.0])) + F.softplus(torch.tensor([-1.0, -0.25, 1.0]))) / 2
    torch.testing.assert_close(scores.loss_passed[0], passed)
    assert (scores.n_failed, scores.n_passed) == (1, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(2, 6), st.booleans())
def test_small_whole_numbers_are_exact_down_to_ties(seed: int, k: int, classes: int, passed_loss: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (classes, 4), generator=g).float()
    x = torch.randint(-2, 3, (30, 4), generator=g).float()
    problem = linear(weight, x, torch.randint(0, classes, (30,), generator=g).tolist())
    where = torch.randperm(weight.numel(), generator=g)[:k]
    values = torch.randint(-2, 3, (6, len(where)), generator=g).float()
    mask = torch.arange(30) % 2 == 0
    scorer = make_scorer(problem.recording(30), where, mask, ~mask, EVALUATOR, passed_loss=passed_loss)
    hits = problem.oracle(where, values).argmax(2) == problem.target
    scores = scorer(values.unsqueeze(0))
    assert scores.patched[0].tolist() == hits[:, mask].sum(1).tolist()
    assert scores.intact[0].tolist() == hits[:, ~mask].sum(1).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 2.0))
def test_samples_left_out_are_certain(seed: int, scale: float) -> None:
    problem = make_problem(REPLAYED["head"], n=N, seed=seed % 7)
    where, values = problem.candidates(20, 12, seed, scale)
    none = torch.zeros(N, dtype=torch.bool)
    scorer = make_scorer(problem.recording(N), where, none, ~none, EVALUATOR, passed_loss=False)
    (chunk_scorer,) = scorer.groups[0].passed
    assert chunk_scorer.head is not None
    passes, fails = chunk_scorer.head.decided(values)
    hits = problem.oracle(where, values).argmax(2) == problem.target
    assert hits[:, passes].all()
    assert not hits[:, fails].any()
    assert scorer(values.unsqueeze(0)).intact[0].tolist() == hits.sum(1).tolist()


@pytest.mark.parametrize("budget", [1, 10_000, 1_000_000])
@pytest.mark.parametrize("name", ["head", "middle linear", "residual, both", "called twice"])
def test_any_budget_gives_the_same(name: str, budget: int) -> None:
    case = WHOLE[name][0] if name in WHOLE else REPLAYED[name]
    problem = make_problem(case, n=N)
    with pytest.warns(UserWarning, match="whole model") if name in WHOLE else nullcontext():
        recording = problem.recording(7, 17)
    where, values = problem.candidates(9, 6)
    scores = [
        make_scorer(recording, where, FAILED, ~FAILED, EVALUATOR, budget=b)(values.unsqueeze(0))
        for b in (budget, 1 << 30)
    ]
    for field in ("patched", "intact"):
        assert torch.equal(getattr(scores[0], field), getattr(scores[1], field))
    for field in ("loss_failed", "loss_passed"):
        torch.testing.assert_close(getattr(scores[0], field), getattr(scores[1], field), rtol=1e-6, atol=1e-6)


def test_out_of_memory_halves_the_block_and_carries_on(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(REPLAYED["middle linear"], n=N)
    where, values = problem.candidates(9, 6)
    scorer = make_scorer(problem.recording(N), where, FAILED, ~FAILED, EVALUATOR)
    expected = scorer(values.unsqueeze(0))
    run, sizes = ChunkScorer.outputs, []

    def tight(self: ChunkScorer, chunk: Any, taps: Any, values: Tensor, *rest: Any) -> Any:
        sizes.append(len(chunk) * len(values))
        if sizes[-1] > 8:
            raise torch.OutOfMemoryError("out of memory")
        return run(self, chunk, taps, values, *rest)

    monkeypatch.setattr(ChunkScorer, "outputs", tight)
    actual = scorer(values.unsqueeze(0))
    assert max(sizes) > 8
    assert (actual.patched.tolist(), actual.intact.tolist()) == (expected.patched.tolist(), expected.intact.tolist())


@pytest.mark.parametrize("name", ["head", "residual, second"])
def test_a_swarm_among_many_scores_as_alone(name: str) -> None:
    problem = make_problem(REPLAYED[name], n=N)
    recording = problem.recording(N)
    where, values = problem.candidates(12, 8)
    values = values.view(3, 4, 8)
    wheres = torch.stack([where, where, torch.where(torch.arange(8) % 2 == 0, where, -1)])
    failed = torch.stack([FAILED, FAILED, torch.arange(N) < 5])
    passed = torch.stack([~FAILED, ~FAILED, torch.arange(N) > 9])
    together = make_scorer(recording, wheres, failed, passed, EVALUATOR)
    assert len(together.groups) == 2
    scores = together(values)
    assert isinstance(scores.n_failed, Tensor)
    assert scores.n_failed.tolist() == [[8], [8], [5]]
    for s in range(3):
        own = wheres[s] >= 0
        alone = make_scorer(recording, wheres[s][own], failed[s], passed[s], EVALUATOR)(values[s : s + 1, :, own])
        for field in ("patched", "intact", "loss_failed", "loss_passed"):
            torch.testing.assert_close(getattr(scores, field)[s : s + 1], getattr(alone, field), rtol=1e-6, atol=0)


def test_swarms_that_do_not_agree_in_number_are_refused() -> None:
    problem = make_problem(REPLAYED["head"], n=N)
    where = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ConfigurationError, match=r"for \[2, 3\] swarms"):
        make_scorer(problem.recording(N), where, FAILED.expand(3, N), ~FAILED, EVALUATOR)


class TwoRanks(Collective):
    """Adds what another rank, simulated here, has to add."""

    def sum(self, x: Tensor) -> Tensor:
        return x + x


def test_counts_are_sums_over_ranks() -> None:
    problem = make_problem(REPLAYED["head"], n=N)
    where, values = problem.candidates(4, 6)
    recording = problem.recording(N)
    one = make_scorer(recording, where, FAILED, ~FAILED, EVALUATOR)(values.unsqueeze(0))
    two = make_scorer(recording, where, FAILED, ~FAILED, replace(EVALUATOR, collective=TwoRanks()))(values.unsqueeze(0))
    assert (two.patched.tolist(), two.n_failed) == ((2 * one.patched).tolist(), 16)
    torch.testing.assert_close(two.loss_failed, one.loss_failed)


def test_a_rank_without_samples_adds_nothing() -> None:
    problem = make_problem(REPLAYED["middle linear"], n=N)
    where, values = problem.candidates(4, 6)
    recording = problem.recording(N, keep=torch.zeros(N, dtype=torch.bool))
    scorer = make_scorer(recording, where, FAILED, ~FAILED, EVALUATOR)
    scores = scorer(values.unsqueeze(0))
    assert (scores.patched.tolist(), scores.loss_passed.tolist()) == ([[0.0] * 4], [[0.0] * 4])


@pytest.mark.parametrize("name", ["head", "middle linear", "conv2d"])
def test_candidates_that_are_not_numbers_have_no_finite_loss(name: str) -> None:
    problem = make_problem(REPLAYED[name], n=N)
    where, values = problem.candidates(3, 6)
    values[1, 0], values[2] = torch.nan, 1e30
    scores = make_scorer(problem.recording(N), where, FAILED, ~FAILED, EVALUATOR)(values.unsqueeze(0))
    logits = problem.oracle(where, values)
    expected = torch.stack([F.cross_entropy(x[FAILED], problem.target[FAILED]) for x in logits])
    assert scores.loss_failed[0].isnan().tolist() == expected.isnan().tolist()
    assert scores.loss_failed[0, 0].isfinite()


class Positive(Task):
    """A task of the user's: right is a first output of at least 0."""

    def passed(self, output: Tensor, target: Any) -> Tensor:
        return output[:, 0] >= 0

    def loss(self, output: Tensor, target: Any) -> Tensor:
        return (output[:, 0] - target["wanted"]).square()


@pytest.mark.parametrize("name", ["head", "middle linear"])
def test_tasks_of_the_user_see_outputs_and_nested_targets(name: str) -> None:
    problem = make_problem(REPLAYED[name], n=N)
    wanted = torch.linspace(-1, 1, N)
    (batch, rows), *_ = problem.batches(N)
    batches = [(type(batch)(batch.args, {"wanted": wanted}, rows), rows)]
    recording = record(
        evaluator := Evaluator(problem.model, Positive()), batches, problem.space, torch.ones(N, dtype=torch.bool)
    )
    where, values = problem.candidates(5, 6)
    scores: Scores = make_scorer(recording, where, FAILED, ~FAILED, evaluator)(values.unsqueeze(0))
    first = problem.oracle(where, values)[..., 0]
    assert scores.patched[0].tolist() == (first >= 0)[:, FAILED].sum(1).tolist()
    expected = (first - wanted).square()[:, ~FAILED].mean(1)
    torch.testing.assert_close(scores.loss_passed[0], expected, rtol=1e-5, atol=1e-5)


def test_without_losses_of_passed_samples_the_rest_is_the_same() -> None:
    for name in ("head", "conv2d", "residual, second"):
        problem = make_problem(REPLAYED[name], n=N)
        where, values = problem.candidates(9, 6, scale=0.2)
        recording = problem.recording(N)
        make: Callable[..., Any] = make_scorer
        full, lean = (
            make(recording, where, FAILED, ~FAILED, EVALUATOR, passed_loss=flag)(values.unsqueeze(0))
            for flag in (True, False)
        )
        assert torch.equal(full.intact, lean.intact)
        assert torch.equal(full.loss_failed, lean.loss_failed)
        assert lean.loss_passed.tolist() == [[0.0] * 9]


class OneHot(Multiclass):
    """Truth as one-hot rows."""

    def label(self, target: Tensor) -> Tensor:
        return target.argmax(1)


@pytest.mark.parametrize(
    ("task", "target"),
    [
        (Multiclass(), torch.tensor([1, 1, 0], dtype=torch.uint8)),
        (Multiclass(), torch.tensor([1, 1, 0], dtype=torch.int32)),
        (OneHot(), torch.tensor([[0, 1, 0], [0, 1, 0], [1, 0, 0]])),
    ],
    ids=["uint8", "int32", "one-hot"],
)
def test_labels_are_what_the_task_says(task: Task, target: Tensor) -> None:
    problem = linear(torch.eye(3), torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [1.0, 0.0, 0.5]]), [])
    problem = replace(problem, target=target)
    failed = torch.tensor([True, False, False])
    scores = make_scorer(problem.recording(3), torch.tensor([3]), failed, ~failed, replace(EVALUATOR, task=task))(
        torch.tensor([[[0.0], [0.75], [2.0]]])  # second logit: x1 + value * x0
    )
    assert scores.patched.tolist() == [[0.0, 1.0, 1.0]]
    assert scores.intact.tolist() == [[2.0, 2.0, 1.0]]


@pytest.mark.parametrize("name", ["head", "middle linear", "residual, both"])
@pytest.mark.parametrize("passed_loss", [False, True])
def test_only_who_breaks_more_than_told_is_given_up(
    name: str, passed_loss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_nrl.search._scoring.scorer.N_MOST_FRAGILE", 4)
    problem = make_problem(REPLAYED[name], n=N)
    where, values = problem.candidates(9, 12)
    fragility = torch.rand(N, generator=torch.Generator().manual_seed(0))
    arguments = (problem.recording(7, 17), where, FAILED, ~FAILED, EVALUATOR)
    scorer = make_scorer(*arguments, passed_loss=passed_loss, fragility=fragility)
    whole = make_scorer(*arguments, passed_loss=passed_loss)(values.unsqueeze(0))
    broken = whole.n_passed - whole.intact
    limit = broken.clone()
    limit[0, ::2] -= 1  # every second candidate breaks one too many
    scores = scorer(values.unsqueeze(0), limit)
    out = broken > limit
    assert out.sum() == 5
    assert torch.equal(scores.loss_failed.isnan(), out)
    for field in ("patched", "intact"):
        assert torch.equal(getattr(scores, field)[~out], getattr(whole, field)[~out])
    for field in ("loss_failed", "loss_passed"):
        actual, expected = (getattr(x, field)[~out] for x in (scores, whole))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_most_fragile_samples_come_first() -> None:
    problem = make_problem(REPLAYED["head"], n=200)
    where, _ = problem.candidates(9, 2)
    mask = torch.arange(200) % 20 == 0
    fragility = torch.arange(200) % 150 * 1.0
    scorer = make_scorer(problem.recording(200), where, mask, ~mask, EVALUATOR, fragility=fragility)
    rows = [part.chunk.rows for part in scorer.groups[0].passed]
    assert len(torch.cat(rows).unique()) == 190
    assert fragility[rows[0]].min() >= fragility[torch.cat(rows[1:])].max()
    assert len(rows[0]) == 128


class Logits(Multiclass):
    """What any task with margins can do; scoring knows no short cut for it."""

    def passed(self, output: Tensor, target: Tensor) -> Tensor:
        return super().passed(output, target)


@pytest.mark.parametrize("passed_loss", [True, False])
@pytest.mark.parametrize("task", [Multiclass(), Logits()], ids=["short cut", "any"])
def test_a_sample_passes_while_it_keeps_its_reserve(task: Task, passed_loss: bool) -> None:
    problem = make_problem(REPLAYED["head"], n=N)
    where, values = problem.candidates(3, 6)
    reserve = torch.rand(N, generator=torch.Generator().manual_seed(0))
    scorers = [
        make_scorer(
            problem.recording(N),
            where,
            FAILED,
            ~FAILED,
            replace(EVALUATOR, task=task),
            passed_loss=passed_loss,
            reserve=x,
        )
        for x in (reserve, None)
    ]
    kept, plain = (scorer(values.unsqueeze(0)) for scorer in scorers)
    outputs = problem.oracle(where, values)
    hits = torch.stack([Multiclass().margin(output, problem.target) >= reserve for output in outputs])
    assert kept.patched[0].tolist() == hits[:, FAILED].sum(1).tolist()
    assert kept.intact[0].tolist() == hits[:, ~FAILED].sum(1).tolist()
    assert (kept.intact < plain.intact).any()
    torch.testing.assert_close(kept.loss_failed, plain.loss_failed)
    torch.testing.assert_close(kept.loss_passed, plain.loss_passed)


@pytest.mark.parametrize("budget", [None, 4_000], ids=["roomy", "tight"])
def test_credits_of_wrong_samples_by_their_loss(budget: int | None) -> None:
    problem = make_problem(REPLAYED["middle linear"], n=N)
    where, values = problem.candidates(9, 6)
    values = values.unsqueeze(0)
    scorer = make_scorer(problem.recording(7, 17), where, FAILED, ~FAILED, EVALUATOR, budget=budget, credit=True)
    scores = scorer(values)
    _, passed, losses = by_sample(scorer, values[0])
    credit = torch.where(passed, 1.0, 1 / (losses + 1))
    n_failed = int(FAILED.sum())
    assert scores.credit_failed is not None
    assert scores.credit_passed is not None
    torch.testing.assert_close(scores.credit_failed[0].double(), credit[:, :n_failed].sum(1))
    torch.testing.assert_close(scores.credit_passed[0].double(), credit[:, n_failed:].sum(1))
    plain = make_scorer(problem.recording(7, 17), where, FAILED, ~FAILED, EVALUATOR)(values)
    assert torch.equal(plain.patched, scores.patched)
    assert plain.credit_failed is None
