"""In what a model is computed, and how far that moves a margin."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from toy_repairs import known, mlp, quick, trained

from lightning_nrl import RepairReport, Settings, repair_module
from lightning_nrl.evaluation import DeployedPrecision, Evaluator
from lightning_nrl.evaluation.deployed_precision import coarse_rounding, rounding_margin, rounding_reserve
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.methods import FineTunePolish

BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)


def results(margin: list[float], targeted: list[bool] | None = None) -> SampleResults:
    n, m = len(margin), torch.tensor(margin)
    zeros = torch.zeros(n, dtype=torch.int64)
    marked = torch.tensor(targeted or [False] * n)
    return SampleResults(("all",), (n,), torch.arange(n), zeros, zeros, torch.zeros(n), m > 0, marked, m)


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
def test_the_coarsest_numbers_count(dtype: torch.dtype, autocast: bool, eps: float, text: str) -> None:
    model = nn.Linear(2, 2).to(dtype)
    found = (Evaluator(model, context=BFLOAT16) if autocast else Evaluator(model)).precision
    assert (found.eps, str(found)) == (eps, text)
    assert found.is_coarse == (eps > 2.0**-23)


def test_tf32_counts_as_float16_and_flags_are_named() -> None:
    found = DeployedPrecision("cuda (H100)", ("float32",), tf32=True, cudnn_benchmark=True)
    assert found.eps == 2.0**-10
    assert str(found) == "float32 on cuda (H100), TF32 allowed, cuDNN benchmark"


def test_a_margin_moves_by_two_eps_of_the_median() -> None:
    precision, before = Evaluator(nn.Linear(2, 2), context=BFLOAT16).precision, results([4.0, 8.0, 16.0, -1.0])
    assert rounding_margin(precision, before) == coarse_rounding(precision, before) == 2 * 2.0**-7 * 8
    assert coarse_rounding(Evaluator(nn.Linear(2, 2)).precision, before) == 0
    assert rounding_margin(precision, results([float("nan")])) is None


def test_the_reserve_is_the_rounding_or_half_of_what_is_there() -> None:
    before = results([8.0, 8.0, 0.1, -1.0, -2.0], [False, False, False, True, False])
    reserve = rounding_reserve(Evaluator(nn.Linear(2, 2), context=BFLOAT16).precision, before)
    assert reserve is not None
    torch.testing.assert_close(reserve, torch.tensor([0.125, 0.125, 0.05, 0.125, 0.0]))
    assert rounding_reserve(Evaluator(nn.Linear(2, 2)).precision, before) is None


def test_rounding_moves_margins_of_a_trained_network_by_about_that() -> None:
    model = trained()
    sharp, coarse = Evaluator(model.eval()), Evaluator(model, context=BFLOAT16)
    before, after = sharp.run(known()), coarse.run(known())
    rounding = rounding_margin(coarse.precision, before)
    assert rounding is not None
    moved = float((before.margin - after.margin).abs().max())
    assert rounding / 20 < moved < rounding


@pytest.mark.parametrize("method", ["finetune-polish", "swarm"])
def test_a_repair_in_bfloat16_keeps_samples_further_from_the_border_than_rounding(method: str) -> None:
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
    assert judge.within_rounding == int((after.passed & (after.margin < judge.rounding)).sum())
    assert RepairReport.from_json(report.to_json()).judge == judge
    assert ("within rounding" in report.to_markdown()) == (judge.within_rounding > 0)
