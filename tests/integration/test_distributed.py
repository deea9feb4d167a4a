"""Two processes repair what one process repairs. A script that plain `ddp` starts again is
`examples/ddp.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import distributed_fit
import pytest
import torch
from digit_models import Classifier, Digits, quick_repair, right, same
from two_processes import in_two_processes, spawning

from lightning_nrl import RegressionFreeRepair, RepairReport, repair


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, trained_path: Path) -> Path:
    """A folder with what one process does."""
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copy(trained_path, folder)
    distributed_fit.fit(folder / "alone", distributed_fit.SIZES)
    return folder / "alone"


def report_in(folder: Path) -> RepairReport:
    return RepairReport.from_json((folder / "report.json").read_text())


def ranks(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def counted(report: RepairReport) -> list[Any]:
    return [(split.split, split.n, split.passed, split.targeted_ids) for split in report.splits]


def assert_like_one_process(one: Path, two: Path) -> RepairReport:
    """Every sample was counted once, and both ranks came to the same end."""
    alone, together = report_in(one), report_in(two)
    assert counted(alone) == counted(together)
    first, second = ranks(two)
    assert first["state"].keys() == second["state"].keys()
    assert same(first["state"], second["state"])
    reports = [RepairReport.from_json(rank["report"]) for rank in (first, second)]
    assert reports[0].splits == reports[1].splits == together.splits
    assert reports[0].hashes == reports[1].hashes
    return together


@pytest.fixture(scope="module")
def together(alone: Path) -> Path:
    """A folder with what two processes do."""
    folder = alone.with_name("together")
    in_two_processes(distributed_fit.fit_all, folder)
    return folder


def test_two_processes_repair_as_one(alone, together):
    reports = [
        assert_like_one_process(alone / str(n), together / str(n)) for n in distributed_fit.SIZES
    ]
    assert reports[0].status == "repaired"
    flipped = [sample for report in reports for split in report.splits for sample in split.flipped]
    assert flipped
    assert all(sample.name == str(sample.label) for sample in flipped)
    assert [[split.n for split in report.splits] for report in reports] == [
        [101, n, 300] for n in (203, 3, 1)
    ]


def test_what_is_judged_is_what_is_saved_where_every_rank_has_statistics_of_its_own(together):
    first, second = (rank["state"] for rank in ranks(together / "batch_norm"))
    assert same(first, second)
    report = report_in(together / "batch_norm")
    assert report.status == "repaired"
    model = Classifier.load_from_checkpoint(report.files["checkpoint"])
    found = report.splits[1]
    assert found.kept + found.repaired == int(right(model, Digits().repair).sum())


def test_two_spawned_processes_repair_as_one_and_the_main_process_gets_the_weights(alone):
    together = alone.with_name("spawned")
    trainer, model = distributed_fit.fit(together, [203], spawning(), 2)
    report = assert_like_one_process(alone / "203", together / "203")
    assert report.status == "repaired"
    (callback,) = (one for one in trainer.callbacks if isinstance(one, RegressionFreeRepair))
    assert callback.report == report
    assert callback.repaired_model_path == report.files["checkpoint"]
    assert trainer.callback_metrics["repair/accepted"] == 1.0
    saved = torch.load(report.files["checkpoint"], weights_only=True)["state_dict"]
    assert same(model, saved)
    assert same(saved, ranks(together / "203")[1]["state"])


def test_spawned_processes_repair_a_checkpoint_and_the_main_process_gets_it(alone):
    folder, model = alone.with_name("spawned") / "checkpoint", Classifier()
    trainer = distributed_fit.trainer_on(folder, spawning(), 2)
    callback = quick_repair(unseen="test", dirpath=folder)
    path, data = alone.with_name("trained.ckpt"), distributed_fit.FewRepairs(203)
    report = repair(trainer, model, datamodule=data, ckpt_path=path, callback=callback)
    assert counted(report) == counted(report_in(alone / "203"))
    saved = torch.load(report.files["checkpoint"], weights_only=True)["state_dict"]
    assert same(model, saved)
