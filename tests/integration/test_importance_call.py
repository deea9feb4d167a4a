from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import QUICK, Classifier, Digits, quiet_trainer
from lightning_package import TensorBoardLogger
from repository import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_nrl import RegressionFreeRepair, SampleOptions, Target, repair
from lightning_nrl.errors import ConfigurationError

STUDIES = ROOT / "examples" / "studies"


def camera(batch: Any) -> list[str]:
    return ["noisy" if noisy else "clean" for noisy in batch[2].tolist()]


def test_slices_reach_report_markdown_and_tensorboard(tmp_path: Path) -> None:
    callback = RegressionFreeRepair(
        samples=SampleOptions(slices=camera, importance=lambda batch: 1 + batch[2].float(), protected=Target.label(0)),
        unseen="test",
        **QUICK,
    )
    logger = TensorBoardLogger(tmp_path)
    quiet_trainer(tmp_path, callback, logger=logger, max_epochs=3).fit(Classifier(), datamodule=Digits())
    report = callback.report
    assert report is not None
    rows = {(one.name, one.role): one for one in report.slices}
    assert set(rows) == {(name, role) for name in ("noisy", "clean") for role in ("known", "unseen")}
    assert sum(one.targeted for one in report.slices if one.role == "known") == report.pooled("known").targeted
    assert "## By slice" in Path(report.files["markdown"]).read_text()
    events = EventAccumulator(f"{logger.log_dir}/repair").Reload()
    logged = events.Scalars("repair_numbers/slice_noisy/unseen_broken")[0].value
    assert logged == rows["noisy", "unseen"].broken


def test_a_column_that_is_not_there_is_found_before_training(tmp_path: Path) -> None:
    callback = RegressionFreeRepair(samples=SampleOptions(importance=7), **QUICK)
    model = Classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match="`importance` raised LookupError: a batch has no column 7"):
        quiet_trainer(tmp_path, callback).fit(model, datamodule=Digits())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_doubted_labels_are_set_aside_and_listed(tmp_path: Path) -> None:
    model, data = Classifier(), Digits()
    quiet_trainer(tmp_path, max_epochs=6).fit(model, datamodule=data)
    arguments = {**QUICK, "method": "convex", "dirpath": tmp_path}
    plain = repair(quiet_trainer(tmp_path), model, datamodule=data, **arguments)
    images, labels, _ = data.repair.tensors
    sure = model.eval()(images).softmax(1).amax(1)
    wrong = [i for i in sure.argsort(descending=True).tolist() if i not in plain.splits[1].targeted_ids][:3]
    labels[wrong] = (labels[wrong] + 1) % 10  # wrong labels, where the model was surest
    report = repair(
        quiet_trainer(tmp_path), model, datamodule=data, samples=SampleOptions(set_aside="doubtful"), **arguments
    )
    aside = {one.id: one for one in report.set_aside}
    assert set(wrong) <= set(aside)
    assert not set(aside) & set(report.splits[1].targeted_ids)
    assert aside[wrong[0]].why == "its label looks wrong"
    assert aside[wrong[0]].label == int(labels[wrong[0]])


def test_the_example_shows_that_importance_changes_what_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(STUDIES), *sys.path])
    example = runpy.run_path(str(STUDIES / "importance.py"))
    model, data = example["trained"](4, 1)
    found = {
        name: example["repaired"](model, data, str(tmp_path), 1, **example["WAYS"][name])
        for name in ("slashed count for 10", "others count for 10")
    }
    repaired = [
        next(one.repaired_in_target for one in report.slices if (one.name, one.role) == ("other", "known"))
        for report in found.values()
    ]
    assert repaired[0] < repaired[1]
    assert all(split.broken == 0 for report in found.values() for split in report.splits if split.role == "known")
