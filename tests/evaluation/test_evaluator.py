"""What a model does on each sample, in the precision in which it is deployed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor, nn
from toy_repairs import known, mlp, trained

from lightning_nrl import (
    ConfigurationError,
    RepairReport,
    Settings,
    Target,
    TensorSource,
    repair_module,
)
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import DataWarning, EvaluationError, ModelError, TargetError
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.methods import FineTunePolish
from lightning_nrl.tasks import Task

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
LABELS = torch.tensor([0, 0, 1, 1, 0])  # right, wrong, wrong, right, right


def source(split: str = "train", rows: slice = slice(None), **marks: Any) -> TensorSource:
    return TensorSource(LOGITS[rows], LABELS[rows], split=split, **marks)


@dataclass(frozen=True)
class Share:
    """Share of a split on one rank, dealt out one by one, in batches of any size and any order."""

    split: str
    x: Tensor
    y: Tensor
    index: Tensor
    position: Tensor
    batch_size: int
    passed: bool = False
    failed: bool = True

    def __iter__(self) -> Iterator[Batch]:
        for part in self.position.split(self.batch_size):
            if len(part):
                yield Batch((self.x[part],), self.y[part], part)


def test_targeted_are_the_failures_that_the_target_chooses_in_sources_marked_failed():
    sources = [source("train"), source("new", failed=True)]
    evidence = Evaluator(nn.Identity()).run(sources, Target.label(1))
    assert evidence.ids(evidence.targeted) == {"train": [], "new": [2]}
    # The passed data are not asked for failures, but for samples of the class.
    assert evidence.ids(evidence.in_target) == {"train": [2, 3], "new": [2, 3]}
    everywhere = Evaluator(nn.Identity()).run(sources, Target.label(1), everywhere=True)
    assert everywhere.ids(everywhere.targeted) == {"train": [2], "new": [2]}


def test_where_a_target_cannot_say_it_all_samples_count_as_in_it():
    def second(batch: tuple[Tensor, ...]) -> Tensor:
        return batch[2]

    evaluator, target = Evaluator(nn.Identity()), Target.where(second)
    with pytest.warns(DataWarning, match="`train` data, whose samples all count as in it.*raised"):
        evidence = evaluator.run([source()], target)
    assert evidence.in_target.all()
    assert not evidence.targeted.any()
    with pytest.raises(TargetError, match="raised"):
        evaluator.run([source(failed=True)], target)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 23), min_size=1, max_size=3),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_every_sample_is_there_exactly_once_in_order(sizes, batch_size, world_size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, generator=generator)
    y = torch.randint(0, 3, (len(x),), generator=generator)
    index = torch.randperm(100, generator=generator)[: len(x)]
    splits = list(zip(*(column.split(sizes) for column in (x, y, index)), strict=True))

    def run(collective: Any) -> SampleResults:
        shuffled = torch.Generator().manual_seed(seed + collective.rank)
        shares = []
        for k, columns in enumerate(splits):
            positions = torch.arange(sizes[k])[collective.rank :: world_size]
            positions = positions[torch.randperm(len(positions), generator=shuffled)]
            shares.append(Share(f"split{k}", *columns, positions, batch_size))
        return Evaluator(nn.Identity(), collective=collective).run(shares, Target.label(1))

    for evidence in on_ranks(world_size, run):
        assert evidence.sizes == tuple(sizes)
        assert torch.equal(evidence.index, index)
        assert torch.equal(evidence.label, y)
        assert torch.equal(evidence.prediction, x.argmax(1))
        assert torch.equal(evidence.passed, x.argmax(1) == y)
        assert torch.equal(evidence.targeted, (x.argmax(1) != y) & (y == 1))
        loss = nn.functional.cross_entropy(x, y, reduction="none")
        torch.testing.assert_close(evidence.loss, loss)


@pytest.mark.parametrize("position", [[0, 1, 2, 3], [0, 1, 2, 3, 3], [0, 1, 2, 3, 4, 4]])
def test_a_sample_that_is_missing_or_twice_is_an_error(position):
    six = [0, 1, 2, 3, 4, 4]
    share = Share("train", LOGITS[six], LABELS[six], torch.arange(5), torch.tensor(position), 2)
    with pytest.raises(
        EvaluationError, match=f"`train` data: read {len(position)} samples instead of each of 5"
    ):
        Evaluator(nn.Identity()).run([share])


def test_a_model_that_fails_on_one_rank_is_named_on_all():
    def run(collective: Any) -> ModelError:
        def forward(batch: Batch) -> Tensor:
            if collective.rank == 1:
                raise IndexError("index out of range")
            return batch.args[0]

        positions = torch.arange(5)[collective.rank :: 2]
        share = Share("train", LOGITS, LABELS, torch.arange(5) + 10, positions, 2)
        with pytest.raises(ModelError) as error:
            Evaluator(nn.Identity(), collective=collective).run([share], forward=forward)
        return error.value

    first, second = on_ranks(2, run)
    assert first.problem == second.problem
    assert second.problem.startswith(
        "`model`: Identity raised IndexError on batch 0 of `train` data, from sample 11 on: "
        "index out of range\n"
    )
    assert isinstance(second.__cause__, IndexError)


def test_sources_need_names_of_their_own():
    with pytest.raises(ConfigurationError, match=r"`sources` has the splits \['a', 'a'\]"):
        Evaluator(nn.Identity()).run([source("a"), source("a")])
    with pytest.raises(ConfigurationError, match=r"`sources` has the splits \[\]"):
        Evaluator(nn.Identity()).run([])


class Column(Task):
    """A task whose passed or loss is `n x 1`, which torch would spread out to `n x n`."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def passed(self, output: Tensor, target: Any) -> Tensor:
        right = output.argmax(1, keepdim=self.wrong == "passed") == target
        return right.float() if self.wrong == "dtype" else right

    def loss(self, output: Tensor, target: Any) -> Tensor:
        return output.sum(1, keepdim=self.wrong == "loss")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ("passed", r"`passed` of Column returned .* \[5, 5\]"),
        ("loss", r"`loss` .* \[5, 1\]"),
        ("dtype", "float32"),
    ],
)
def test_a_task_that_does_not_judge_one_sample_at_a_time_is_refused(wrong, found):
    with pytest.raises(ConfigurationError, match=f"`task`: .*{found}"):
        Evaluator(nn.Identity(), Column(wrong)).run([source()])


@pytest.mark.parametrize("no_class", [-100, -1])
def test_samples_without_a_class_are_named(no_class):
    labels = TensorSource(LOGITS, torch.tensor([0, no_class, 1, 1, no_class]), split="train")
    with pytest.raises(
        EvaluationError,
        match=r"`train` data: 2 samples have labels below 0 or above .* \(\[1, 4\]\)",
    ):
        Evaluator(nn.Identity()).run([labels])


def test_data_that_lie_elsewhere_than_the_model_are_named():
    evaluator = Evaluator(nn.Linear(3, 3, device="meta"))
    with pytest.raises(ConfigurationError, match="`train` data are on cpu, but the model is on"):
        evaluator.run([source()])


BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "autocast", "eps", "text"),
    [
        (torch.float32, False, 2.0**-23, "float32 on cpu"),
        (torch.float32, True, 2.0**-7, "float32 on cpu, autocast to bfloat16"),
        (torch.float16, False, 2.0**-10, "float16 on cpu"),
    ],
)
def test_the_coarsest_numbers_count(dtype, autocast, eps, text):
    model = nn.Linear(2, 2).to(dtype)
    precision = Evaluator(model, context=BFLOAT16 if autocast else nullcontext).precision
    assert (precision.eps, str(precision)) == (eps, text)


def test_a_repair_in_bfloat16_keeps_margins_above_rounding():
    evaluator = Evaluator(trained(mlp).eval(), context=BFLOAT16)
    before = evaluator.run(known())
    outcome = repair_module(evaluator, known(), Settings(method=FineTunePolish()))
    report = outcome.report
    assert report.status == "repaired"
    judge = report.judge
    assert judge.rounding is not None
    after = evaluator.run_with(outcome.parameters or {}, known())
    kept = before.passed & (before.margin > 2 * judge.rounding)
    assert (after.margin[kept] >= judge.rounding).all()
    assert judge.n_borderline == int((after.passed & (after.margin < judge.rounding)).sum())
    assert RepairReport.from_json(report.to_json()).judge == judge
    assert ("within rounding" in report.to_markdown()) == (judge.n_borderline > 0)
