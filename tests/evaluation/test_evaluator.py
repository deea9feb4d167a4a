"""What a model does on each sample, in the precision in which it is deployed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor, nn
from toy_repairs import known, mlp, quick, trained

from lightning_nrl import (
    ConfigurationError,
    RepairReport,
    Settings,
    Target,
    TensorSource,
    repair_module,
)
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import DataWarning, EvaluationError, TargetError
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
    """One rank's share of a split, dealt out one by one, in batches of any size and in any order."""

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


def test_each_sample_has_a_row_with_what_the_model_did() -> None:
    evidence = Evaluator(nn.Identity()).run([source()])
    assert evidence.prediction.tolist() == [0, 1, 0, 1, 0]
    assert evidence.label.tolist() == [0, 0, 1, 1, 0]
    assert evidence.passed.tolist() == [True, False, False, True, True]
    torch.testing.assert_close(
        evidence.loss, torch.tensor([0.12693, 2.12693, 3.04859, 0.31326, 0.31326])
    )
    assert not evidence.targeted.any()
    assert len(evidence) == 5


def test_targeted_are_the_failures_that_the_target_chooses_in_sources_marked_failed() -> None:
    sources = [source("train"), source("new", failed=True)]
    evidence = Evaluator(nn.Identity()).run(sources, Target.label(1))
    assert evidence.ids(evidence.targeted) == {"train": [], "new": [2]}
    # The passed data are not asked for failures, but for samples of the class.
    assert evidence.ids(evidence.in_target) == {"train": [2, 3], "new": [2, 3]}
    everywhere = Evaluator(nn.Identity()).run(sources, Target.label(1), everywhere=True)
    assert everywhere.ids(everywhere.targeted) == {"train": [2], "new": [2]}


def test_where_a_target_cannot_say_it_all_samples_count_as_in_it() -> None:
    def second(batch: tuple[Tensor, ...]) -> Tensor:
        return batch[2]

    lacking, target = source("train"), Target.where(second)
    with pytest.warns(
        DataWarning, match="`train` data, whose samples all count as in it.*raised"
    ) as told:
        evidence = Evaluator(nn.Identity()).run([lacking], target)
    assert len(told) == 1
    assert (evidence.in_target.all(), evidence.targeted.any()) == (True, False)
    with pytest.raises(TargetError, match="raised"):
        Evaluator(nn.Identity()).run([replace(lacking, failed=True)], target)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 23), min_size=1, max_size=3),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_every_sample_is_there_exactly_once_in_order(
    sizes: list[int], batch_size: int, world_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = [
        (torch.randn(n, 3, generator=generator), torch.randint(0, 3, (n,), generator=generator))
        for n in sizes
    ]
    ids = [torch.randperm(100, generator=generator)[:n].sort().values for n in sizes]

    def run(collective: Any) -> SampleResults:
        shuffled = torch.Generator().manual_seed(seed + collective.rank)
        shares = []
        for k, (x, y) in enumerate(data):
            mine = torch.arange(len(x))[collective.rank :: world_size]
            mine = mine[torch.randperm(len(mine), generator=shuffled)]
            shares.append(Share(f"split{k}", x, y, ids[k], mine, batch_size))
        return Evaluator(nn.Identity(), collective=collective).run(shares, Target.label(1))

    x, y = (torch.cat(column) for column in zip(*data, strict=True))
    expected_loss = nn.functional.cross_entropy(x, y, reduction="none")
    for evidence in on_ranks(world_size, run):
        assert evidence.sizes == tuple(sizes)
        assert torch.equal(evidence.index, torch.cat(ids))
        assert torch.equal(evidence.label, y)
        assert torch.equal(evidence.prediction, x.argmax(1))
        assert torch.equal(evidence.passed, x.argmax(1) == y)
        assert torch.equal(evidence.targeted, (x.argmax(1) != y) & (y == 1))
        torch.testing.assert_close(evidence.loss, expected_loss)


@pytest.mark.parametrize(
    "position", [[0, 1, 2, 3], [0, 1, 2, 3, 3], [0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 5]]
)
def test_a_sample_that_is_missing_or_twice_is_an_error(position: list[int]) -> None:
    six = [0, 1, 2, 3, 4, 4]
    share = Share("train", LOGITS[six], LABELS[six], torch.arange(5), torch.tensor(position), 2)
    with pytest.raises(
        EvaluationError, match=f"`train` data: read {len(position)} samples instead of each of 5"
    ):
        Evaluator(nn.Identity()).run([share])


def test_one_rank_that_fails_stops_all() -> None:
    def run(collective: Any) -> str:
        def forward(x: Tensor) -> Tensor:
            if collective.rank == 1:
                raise OSError("no such image")
            return x

        share = Share(
            "train", LOGITS, LABELS, torch.arange(5), torch.arange(5)[collective.rank :: 2], 2
        )
        with pytest.raises((OSError, EvaluationError)) as error:
            Evaluator(nn.Identity(), collective=collective).run([share], forward=forward)
        return str(error.value)

    other, own = on_ranks(2, run)
    assert "`train` data could not be read on another rank" in other
    assert own == "no such image"


def test_sources_need_names_of_their_own() -> None:
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
def test_a_task_that_does_not_judge_one_sample_at_a_time_is_refused(wrong: str, found: str) -> None:
    with pytest.raises(ConfigurationError, match=f"`task`: .*{found}"):
        Evaluator(nn.Identity(), Column(wrong)).run([source()])


@pytest.mark.parametrize("no_class", [-100, -1])
def test_samples_without_a_class_are_named(no_class: int) -> None:
    labels = TensorSource(LOGITS, torch.tensor([0, no_class, 1, 1, no_class]), split="train")
    with pytest.raises(
        EvaluationError,
        match=r"`train` data: 2 samples have labels below 0 or above .* \(\[1, 4\]\)",
    ):
        Evaluator(nn.Identity()).run([labels])


def test_a_label_without_a_logit_is_refused() -> None:
    labels = TensorSource(LOGITS, torch.tensor([0, 1, LOGITS.shape[1], 1, 0]), split="train")
    message = rf"there is a label {LOGITS.shape[1]}, and the model returned"
    with pytest.raises(ConfigurationError, match=message):
        Evaluator(nn.Identity()).run([labels])


def test_data_that_lie_elsewhere_than_the_model_are_named() -> None:
    evaluator = Evaluator(nn.Linear(3, 3, device="meta"))
    message = r"`train` data are on cpu, but the model is on meta\.\nHINT: .*`TensorSource\(\.\.\., device='meta'\)`"
    with pytest.raises(ConfigurationError, match=message) as caught:
        evaluator.run([source()])
    assert isinstance(caught.value.__cause__, RuntimeError)


BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "autocast", "eps", "text"),
    [
        (torch.float32, False, 2.0**-23, "float32 on cpu"),
        (torch.float32, True, 2.0**-7, "float32 on cpu, autocast to bfloat16"),
        (torch.bfloat16, False, 2.0**-7, "bfloat16 on cpu"),
        (torch.float16, False, 2.0**-10, "float16 on cpu"),
        (torch.float64, False, 2.0**-52, "float64 on cpu"),
    ],
)
def test_the_coarsest_numbers_count(
    dtype: torch.dtype, autocast: bool, eps: float, text: str
) -> None:
    model = nn.Linear(2, 2).to(dtype)
    found = (Evaluator(model, context=BFLOAT16) if autocast else Evaluator(model)).precision
    assert (found.eps, str(found)) == (eps, text)


@pytest.mark.parametrize("method", ["finetune-polish", "swarm"])
def test_a_repair_in_bfloat16_keeps_samples_further_from_the_border_than_rounding(
    method: str,
) -> None:
    settings = Settings(method=FineTunePolish()) if method == "finetune-polish" else quick()
    evaluator = Evaluator(trained(mlp).eval(), context=BFLOAT16)
    before = evaluator.run(known())
    outcome = repair_module(evaluator, known(), settings)
    report = outcome.report
    assert report.status == "repaired"
    judge = report.judge
    assert judge is not None
    assert judge.rounding is not None
    assert str(judge.precision) == "float32 on cpu, autocast to bfloat16"
    after = evaluator.run_with(outcome.parameters or {}, known())
    kept = before.passed & (before.margin > 2 * judge.rounding)
    assert (after.margin[kept] >= judge.rounding).all()
    assert judge.n_borderline == int((after.passed & (after.margin < judge.rounding)).sum())
    assert RepairReport.from_json(report.to_json()).judge == judge
    assert ("within rounding" in report.to_markdown()) == (judge.n_borderline > 0)
