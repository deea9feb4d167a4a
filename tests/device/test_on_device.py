"""Every method, task, gate and report on a device: a card, or the stand-in that
`test_strict_device.py` starts.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from device_repairs import CASES, GPU, LONG_CASES, QUICK_SWARM, TASKS, counted, sources, untrained
from toy_repairs import blobs, quick, trained

from lightning_nrl import Gate, Grid, OldModel, Target, TensorSource, repair_module
from lightning_nrl.analysis.comparison import compare_module
from lightning_nrl.analysis.diagnosis import diagnose_module
from lightning_nrl.pipeline import Outcome
from lightning_nrl.release import release
from lightning_nrl.study import sweep_module

STRICT = "strict_cuda" in sys.modules
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def check_alike(there: Outcome, here: Outcome) -> None:
    """A real card sums in another order, so that counts may differ there."""
    assert there.report.status == here.report.status
    if STRICT:
        assert counted(there) == counted(here)


@pytest.mark.parametrize("name", CASES if STRICT else {**CASES, **LONG_CASES})
def test_a_repair_there_is_what_it_is_on_the_cpu(name):
    make, settings = {**CASES, **LONG_CASES}[name]
    model = trained(make).to(GPU)
    before = copy.deepcopy(model).eval()
    outcome = repair_module(model, sources(GPU), settings)
    alone = repair_module(trained(make), sources(), settings)
    check_alike(outcome, alone)
    if outcome.write(model):
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        for source in sources(GPU):
            x, y = source.inputs.to(GPU), source.targets.to(GPU)
            with torch.no_grad():
                assert not ((before(x).argmax(1) == y) & (model.eval()(x).argmax(1) != y)).any()


@pytest.mark.parametrize("name", TASKS)
def test_each_task_is_counted_as_on_the_cpu(name):
    there, here = (
        repair_module(*untrained(name, device), quick()) for device in (GPU, torch.device("cpu"))
    )
    check_alike(there, here)
    assert sum(split.broken for split in there.report.splits) == 0


@pytest.mark.parametrize("gate", ["instance", "instance-in-target", "accuracy", "tolerance:0.05"])
def test_each_gate(gate):
    settings = quick(gate=Gate.parse(gate), target=Target.label(0), slices=lambda batch: batch[1])
    settings = replace(
        settings,
        samples=replace(settings.samples, importance="focal", protected=near, set_aside="doubtful"),
    )
    there, here = (repair_module(trained().to(d), sources(d), settings) for d in (GPU, "cpu"))
    check_alike(there, here)
    assert there.report.to_markdown()


def near(batch: Any) -> Any:
    return batch[0][:, 0] > 1.5


def test_limits_from_calibration_data_and_figures_of_unseen_data():
    settings = quick(limit="tolerance:0.1", gate=Gate.tolerance(0.1))
    extra = {
        name: [TensorSource(*blobs(80, 1.5, seed), split=name, device=GPU)]
        for name, seed in (("unseen", 3), ("calibration", 4))
    }
    report = repair_module(trained().to(GPU), sources(GPU), settings, **extra).report
    assert type(report).from_json(report.to_json()) == report


def two() -> tuple[Any, Any]:
    return trained(seed=1).to(GPU), trained(seed=2).to(GPU)


def test_an_update_is_repaired_and_released():
    old, new = two()
    for reference in (OldModel(old), OldModel(trained(seed=1))):
        report = repair_module(new, sources(GPU), quick(), reference=reference).report
        assert sum(split.broken for split in report.splits) == 0
    data = TensorSource(*blobs(200, 0.5, seed=7), split="test", batch_size=64, device=GPU)
    released = release(
        old, new, data, ["accuracy", "nfr:20%", "slices"], slices=lambda batch: batch[1]
    )
    assert released.rows[0].counts.n == 200


def test_diagnosis_comparison_and_sweep():
    diagnosis = diagnose_module(trained().to(GPU), sources(GPU))
    assert diagnosis.to_markdown()
    compared = compare_module(trained().to(GPU), sources(GPU), methods={"swarm": QUICK_SWARM})
    assert compared.to_markdown()
    sweep = sweep_module(
        trained().to(GPU), sources(GPU), Grid(n_weights=[6, 12]), seeds=2, base=quick()
    )
    assert len(sweep.runs) == 4
