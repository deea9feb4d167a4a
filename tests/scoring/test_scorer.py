"""Counts and losses: near ties, memory, samples left out, ranks, tasks of the user."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scoring_networks import REPLAYED, WHOLE, Problem, by_sample, make_problem
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_nrl._utils.distributed import Collective
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search.scores import Scores
from lightning_nrl.search.scoring.chunk_scorer import ChunkScorer
from lightning_nrl.tasks import Multiclass, Task

N = 24
FAILED = torch.arange(N) % 3 == 0


def linear(weight: Tensor, x: Tensor, target: list[int] | Tensor) -> Problem:
    model = nn.Linear(weight.shape[1], len(weight), bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    return Problem(model.eval(), find_layers(model, ""), (x,), torch.as_tensor(target))


def same(
    found: Scores, expected: Scores, *, which: Any = slice(None), exactly: bool = False
) -> None:
    """Counts are equal, losses up to rounding or to the bit."""
    for name, value in vars(expected).items():
        if isinstance(value, Tensor) and ("loss" in name or "credit" in name) and not exactly:
            torch.testing.assert_close(
                getattr(found, name)[which], value[which], rtol=1e-5, atol=1e-6
            )
        elif isinstance(value, Tensor):
            assert torch.equal(getattr(found, name)[which], value[which]), name


def test_by_hand() -> None:
    problem = linear(torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 3.0], [1.0, 0.0]]), [1, 1, 0])
    failed = torch.tensor([True, False, False])
    scores = problem.scorer(torch.tensor([2]), failed, ~failed)(
        torch.tensor([[0.0], [0.75], [2.0]])
    )
    # The second logit is x1 + value * x0.
    assert scores.patched.tolist() == [0.0, 1.0, 1.0]
    assert scores.intact.tolist() == [2.0, 2.0, 1.0]
    gaps = torch.tensor([-1.0, 0.5, 3.0])  # second minus first logit of the failed sample
    torch.testing.assert_close(scores.loss_failed, F.softplus(-gaps))
    passed = (
        F.softplus(-torch.tensor([2.0, 2.75, 4.0])) + F.softplus(torch.tensor([-1.0, -0.25, 1.0]))
    ) / 2
    torch.testing.assert_close(scores.loss_passed, passed)
    assert (scores.n_failed, scores.n_passed) == (1, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(2, 6), st.booleans())
def test_small_whole_numbers_are_exact_down_to_ties(
    seed: int, k: int, classes: int, passed_loss: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (classes, 4), generator=g).float()
    x = torch.randint(-2, 3, (30, 4), generator=g).float()
    problem = linear(weight, x, torch.randint(0, classes, (30,), generator=g))
    where = torch.randperm(weight.numel(), generator=g)[:k]
    values = torch.randint(-2, 3, (6, len(where)), generator=g).float()
    mask = torch.arange(30) % 2 == 0
    hits = problem.oracle(where, values).argmax(2) == problem.target
    scores = problem.scorer(where, mask, ~mask, passed_loss=passed_loss)(values)
    assert scores.patched.tolist() == hits[:, mask].sum(1).tolist()
    assert scores.intact.tolist() == hits[:, ~mask].sum(1).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 2.0))
def test_samples_left_out_are_certain(seed: int, scale: float) -> None:
    problem = make_problem(REPLAYED["head"], n=N, seed=seed % 7)
    where, values = problem.candidates(20, 12, seed, scale)
    none = torch.zeros(N, dtype=torch.bool)
    scorer = problem.scorer(where, none, ~none, passed_loss=False)
    (chunk_scorer,) = scorer.passed
    assert chunk_scorer.head is not None
    passes, fails = chunk_scorer.head.decided(values)
    hits = problem.oracle(where, values).argmax(2) == problem.target
    assert hits[:, passes].all()
    assert not hits[:, fails].any()
    assert scorer(values).intact.tolist() == hits.sum(1).tolist()


@pytest.mark.parametrize("budget", [1, 10_000, 1_000_000])
@pytest.mark.parametrize("name", ["head", "middle linear", "residual, both", "called twice"])
def test_any_budget_gives_the_same(name: str, budget: int) -> None:
    problem = make_problem(WHOLE[name][0] if name in WHOLE else REPLAYED[name], n=N)
    with pytest.warns(UserWarning, match="whole model") if name in WHOLE else nullcontext():
        recording = problem.recording(7, 17)
    where, values = problem.candidates(9, 6)
    tight, roomy = (
        problem.scorer(where, FAILED, ~FAILED, recording=recording, budget=b)(values)
        for b in (budget, 1 << 30)
    )
    same(tight, roomy)


def test_out_of_memory_halves_the_block_and_carries_on(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(REPLAYED["middle linear"], n=N)
    where, values = problem.candidates(9, 6)
    scorer = problem.scorer(where, FAILED, ~FAILED)
    expected = scorer(values)
    run, sizes = ChunkScorer.outputs, []

    def tight(self: ChunkScorer, chunk: Any, taps: Any, values: Tensor, *rest: Any) -> Any:
        sizes.append(len(chunk) * len(values))
        if sizes[-1] > 8:
            raise torch.OutOfMemoryError("out of memory")
        return run(self, chunk, taps, values, *rest)

    monkeypatch.setattr(ChunkScorer, "outputs", tight)
    same(scorer(values), expected)
    assert max(sizes) > 8


@pytest.mark.parametrize("name", ["head", "middle linear"])
def test_where_memory_runs_out_chunks_are_halved_and_nothing_is_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = ChunkScorer.keep

    def tight(self: ChunkScorer, room: int) -> None:
        if len(self.chunk) > 2:
            raise torch.OutOfMemoryError("out of memory")
        keep(self, room)

    monkeypatch.setattr(ChunkScorer, "keep", tight)
    problem = make_problem(REPLAYED[name], n=12)
    everyone = torch.ones(12, dtype=torch.bool)
    where, _ = problem.candidates(1, 6)
    parts = problem.scorer(where, everyone, ~everyone).failed
    assert torch.cat([part.chunk.rows for part in parts]).tolist() == list(range(12))
    assert {part.nbytes for part in parts} == {0}
    assert len(parts[0].chunk) == 6


class TwoRanks(Collective):
    """Adds what another rank, simulated here, has to add."""

    def sum(self, x: Tensor) -> Tensor:
        return x + x


def test_counts_are_sums_over_ranks_and_one_without_samples_adds_nothing() -> None:
    problem = make_problem(REPLAYED["head"], n=N)
    where, values = problem.candidates(4, 6)
    one = problem.scorer(where, FAILED, ~FAILED)(values)
    ranks = problem.recording(N, evaluator=Evaluator(problem.model, collective=TwoRanks()))
    two = problem.scorer(where, FAILED, ~FAILED, recording=ranks)(values)
    assert (two.patched.tolist(), two.n_failed) == ((2 * one.patched).tolist(), 16)
    torch.testing.assert_close(two.loss_failed, one.loss_failed)
    nothing = problem.recording(N, keep=torch.zeros(N, dtype=torch.bool))
    scores = problem.scorer(where, FAILED, ~FAILED, recording=nothing)(values)
    assert (scores.patched.tolist(), scores.loss_passed.tolist()) == ([0.0] * 4, [0.0] * 4)


@pytest.mark.parametrize("name", ["head", "middle linear", "conv2d"])
def test_candidates_that_are_not_numbers_have_no_finite_loss(name: str) -> None:
    problem = make_problem(REPLAYED[name], n=N)
    where, values = problem.candidates(3, 6)
    values[1, 0], values[2] = torch.nan, 1e30
    scores = problem.scorer(where, FAILED, ~FAILED)(values)
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
def test_tasks_of_the_user_see_outputs_and_targets(name: str) -> None:
    wanted = torch.linspace(-1, 1, N)
    problem = replace(make_problem(REPLAYED[name], n=N), target=wanted)
    recording = problem.recording(N, evaluator=Evaluator(problem.model, Positive()))
    where, values = problem.candidates(5, 6)
    scores = problem.scorer(where, FAILED, ~FAILED, recording=recording)(values)
    first = problem.oracle(where, values)[..., 0]
    assert scores.patched.tolist() == (first >= 0)[:, FAILED].sum(1).tolist()
    expected = (first - wanted).square()[:, ~FAILED].mean(1)
    torch.testing.assert_close(scores.loss_passed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["head", "conv2d", "residual, second"])
def test_without_losses_of_passed_samples_the_rest_is_the_same(name: str) -> None:
    problem = make_problem(REPLAYED[name], n=N)
    where, values = problem.candidates(9, 6, scale=0.2)
    full, lean = (
        problem.scorer(where, FAILED, ~FAILED, passed_loss=flag)(values) for flag in (True, False)
    )
    assert torch.equal(full.intact, lean.intact)
    assert torch.equal(full.loss_failed, lean.loss_failed)
    assert lean.loss_passed.tolist() == [0.0] * 9


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
    problem = linear(
        torch.eye(3), torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [1.0, 0.0, 0.5]]), target
    )
    failed = torch.tensor([True, False, False])
    recording = problem.recording(3, evaluator=Evaluator(problem.model, task))
    scorer = problem.scorer(torch.tensor([3]), failed, ~failed, recording=recording)
    scores = scorer(torch.tensor([[0.0], [0.75], [2.0]]))  # second logit: x1 + value * x0
    assert scores.patched.tolist() == [0.0, 1.0, 1.0]
    assert scores.intact.tolist() == [2.0, 2.0, 1.0]


@pytest.mark.parametrize("name", ["head", "middle linear", "residual, both"])
@pytest.mark.parametrize("passed_loss", [False, True])
def test_only_who_breaks_more_than_told_is_given_up(
    name: str, passed_loss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_nrl.search.scoring.scorer.N_MOST_FRAGILE", 4)
    problem = make_problem(REPLAYED[name], n=N)
    where, values = problem.candidates(9, 12)
    fragility = torch.rand(N, generator=torch.Generator().manual_seed(0))
    make = partial(problem.scorer, where, FAILED, ~FAILED, passed_loss=passed_loss)
    whole = make()(values)
    broken = whole.n_passed - whole.intact
    limit = broken.clone()
    limit[::2] -= 1  # every second candidate breaks one too many
    scores = make(fragility=fragility)(values, limit)
    out = broken > limit
    assert out.sum() == 5
    assert torch.equal(scores.loss_failed.isnan(), out)
    same(scores, whole, which=~out)


def test_the_most_fragile_samples_come_first() -> None:
    problem = make_problem(REPLAYED["head"], n=200)
    where, _ = problem.candidates(9, 2)
    mask = torch.arange(200) % 20 == 0
    fragility = torch.arange(200) % 150 * 1.0
    rows = [
        part.chunk.rows for part in problem.scorer(where, mask, ~mask, fragility=fragility).passed
    ]
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
    recording = problem.recording(N, evaluator=Evaluator(problem.model, task))
    make = partial(
        problem.scorer, where, FAILED, ~FAILED, recording=recording, passed_loss=passed_loss
    )
    kept, plain = (make(reserve=x)(values) for x in (reserve, None))
    logits = problem.oracle(where, values)
    hits = torch.stack([Multiclass().margin(x, problem.target) > reserve for x in logits])
    assert kept.patched.tolist() == hits[:, FAILED].sum(1).tolist()
    assert kept.intact.tolist() == hits[:, ~FAILED].sum(1).tolist()
    assert (kept.intact < plain.intact).any()
    torch.testing.assert_close(kept.loss_failed, plain.loss_failed)
    torch.testing.assert_close(kept.loss_passed, plain.loss_passed)


@pytest.mark.parametrize("budget", [None, 4_000], ids=["roomy", "tight"])
def test_credits_of_wrong_samples_by_their_loss(budget: int | None) -> None:
    problem = make_problem(REPLAYED["middle linear"], n=N)
    where, values = problem.candidates(9, 6)
    scorer = problem.scorer(where, FAILED, ~FAILED, budget=budget, credit=True)
    scores = scorer(values)
    _, passed, losses = by_sample(scorer, values)
    credit = torch.where(passed, 1.0, 1 / (losses + 1))
    n_failed = int(FAILED.sum())
    assert scores.credit_failed is not None
    assert scores.credit_passed is not None
    torch.testing.assert_close(scores.credit_failed.double(), credit[:, :n_failed].sum(1))
    torch.testing.assert_close(scores.credit_passed.double(), credit[:, n_failed:].sum(1))
