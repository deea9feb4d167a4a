"""A repair's promise, counted again on the predictions of the deployed model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_repairs import known, quick, trained

from lightning_nrl import RepairReport, repair_module
from lightning_nrl.entrypoints.command_line import main
from lightning_nrl.updates import Predictions


@pytest.fixture(scope="module")
def repaired() -> tuple[RepairReport, torch.nn.Module]:
    model = trained()
    outcome = repair_module(model, known(), quick())
    assert outcome.write(model)
    return outcome.report, model.eval()


def recount(folder: Path, report: RepairReport, model: torch.nn.Module, n: int = 120) -> int:
    splits = {}
    for source in known(n=n):
        prediction = model(source.inputs).argmax(1)
        right = prediction == source.targets
        pairs = zip(prediction.tolist(), right.tolist(), strict=True)
        splits[source.split] = dict(zip(source.index.tolist(), pairs, strict=True))
    (folder / "report.json").write_text(report.to_json())
    Predictions(splits).save(folder / "new.csv")
    files = [str(folder / "report.json"), "--predictions", str(folder / "new.csv")]
    return main(["recount", *files])


def test_the_promise_holds_for_the_repaired_weights(repaired, tmp_path, capsys):
    report, model = repaired
    assert recount(tmp_path, report, model) == 0
    counts = report.known_counts
    line = capsys.readouterr().out
    assert line.startswith("Promise kept by the deployed model: ")
    assert f"{counts.repaired_in_target} of {counts.targeted} targeted failures pass now" in line
    assert f"Of {counts.passed} known samples that passed before, none broke" in line


def test_a_conversion_that_breaks_samples_is_named(repaired, tmp_path, capsys):
    report, model = repaired
    coarse = torch.nn.Sequential(model, torch.nn.Threshold(1.0, 0.0))
    assert recount(tmp_path, report, coarse) == 1
    line = capsys.readouterr().out
    assert line.startswith("Promise NOT kept by the deployed model: ")
    (train, repair) = report.splits
    broken = 0
    for split, source in zip((train, repair), known(), strict=True):
        right = coarse(source.inputs).argmax(1) == source.targets
        right[list(split.failed_ids)] = True
        broken += int((~right).sum())
    assert f"{broken} would break" in line
    assert line.count("\n") == 1


def test_other_samples_are_refused(repaired, tmp_path, capsys):
    assert recount(tmp_path, *repaired, n=60) == 2
    message = capsys.readouterr().err
    assert "`predictions` have 60 samples of `train`, the report 120" in message
    assert "HINT: predict each known sample once" in message
