"""In what a model is computed, and how far that moves a margin."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from toy_repairs import known, mlp, quick, trained

from lightning_nrl import RepairReport, Settings, repair_module
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.deployed_precision import rounding_margin
from lightning_nrl.methods import FineTunePolish

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
def test_the_coarsest_numbers_count(dtype: torch.dtype, autocast: bool, eps: float, text: str) -> None:
    model = nn.Linear(2, 2).to(dtype)
    found = (Evaluator(model, context=BFLOAT16) if autocast else Evaluator(model)).precision
    assert (found.eps, str(found)) == (eps, text)
    assert found.is_coarse == (eps > 2.0**-23)


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
