from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy_repairs import known, quick, trained

from lightning_nrl import ConfigurationError, RepairReport, repair_module
from lightning_nrl._trainer.repair_files import (
    REPAIRED_FILES,
    REPORT_FILES,
    base_folder,
    headline,
    output_folder,
    report_files,
    write_report,
)
from lightning_nrl.pipeline import patch_file
from lightning_nrl.report.sample_views import SampleView


def trainer_in(folder: Any, log_dir: Any = None, fast: int = 0, first: bool = True, logger: Any = None) -> Any:
    """As much of a trainer as the choice of a folder needs."""
    logger = SimpleNamespace(log_dir=str(log_dir)) if log_dir else logger
    return SimpleNamespace(
        loggers=[logger] if logger else [],
        default_root_dir=folder,
        fast_dev_run=fast,
        is_global_zero=first,
        strategy=SimpleNamespace(broadcast=lambda x: x),
    )


def test_the_log_folder_goes_before_the_root_folder(tmp_path: Path) -> None:
    assert output_folder(None, trainer_in(tmp_path)) == tmp_path / "repair"
    assert output_folder(None, trainer_in(tmp_path, tmp_path / "version_0")) == tmp_path / "version_0" / "repair"


def test_a_logger_without_a_log_folder_has_one_for_each_run_where_its_checkpoints_are(tmp_path: Path) -> None:
    remote = SimpleNamespace(save_dir=None, name="digits", version="x7k2")
    assert output_folder(None, trainer_in(tmp_path, logger=remote)) == tmp_path / "digits" / "x7k2" / "repair"
    local = SimpleNamespace(save_dir=str(tmp_path / "runs"), name=None, version=3)
    assert output_folder(None, trainer_in(tmp_path, logger=local)) == tmp_path / "runs" / "version_3" / "repair"


def test_a_folder_with_a_report_is_left_alone(tmp_path: Path) -> None:
    for name in ("repair", "repair-1", "repair-2"):
        folder = output_folder(None, trainer_in(tmp_path))
        assert folder == tmp_path / name
        (folder / "report.json").touch()


def test_a_folder_that_the_user_named_is_taken_as_it_is(tmp_path: Path) -> None:
    for _ in range(2):
        folder = output_folder(tmp_path / "mine", trainer_in(tmp_path))
        assert folder == tmp_path / "mine"
        (folder / "report.json").touch()


def test_a_fast_run_has_no_folder(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "mine", trainer_in(tmp_path, fast=1)) is None
    assert list(tmp_path.iterdir()) == []


def test_the_first_rank_alone_makes_the_folder(tmp_path: Path) -> None:
    output_folder(None, trainer_in(tmp_path, first=False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dirpath", "root"), [("s3://bucket/a", "."), (None, "gs://bucket/a")])
def test_a_folder_that_is_not_local_is_refused(dirpath: str | None, root: str) -> None:
    with pytest.raises(ConfigurationError, match=r"`dirpath`: [\s\S]*://bucket/a', which is no local folder"):
        base_folder(dirpath, trainer_in(root))


def test_files_are_named_by_kind(tmp_path: Path) -> None:
    files, name = report_files(tmp_path, trainer_in(tmp_path), "repair", {"checkpoint": "a.ckpt", **REPORT_FILES})
    assert list(files) == ["checkpoint", "json", "markdown", "html"]
    assert (files["checkpoint"], name) == (str(tmp_path / "a.ckpt"), "repair")
    assert report_files(tmp_path, trainer_in(tmp_path), "repair", REPORT_FILES)[0] == {
        "json": str(tmp_path / "report.json"),
        "markdown": str(tmp_path / "report.md"),
        "html": str(tmp_path / "report.html"),
    }
    assert report_files(None, trainer_in(tmp_path, fast=1), "repair", REPORT_FILES) == ({}, "repair")


def test_a_patch_is_named_where_it_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["checkpoint", "patch", "json", "markdown", "html"]
    assert list(report_files(tmp_path, trainer_in(tmp_path), "repair", REPAIRED_FILES)[0]) == kinds
    monkeypatch.setattr(patch_file, "find_spec", lambda name: None)
    kinds.remove("patch")
    assert list(report_files(tmp_path, trainer_in(tmp_path), "repair", REPAIRED_FILES)[0]) == kinds


def test_a_second_report_in_a_log_has_a_name_of_its_own(tmp_path: Path) -> None:
    for name in ("release", "release-1"):
        files, tag = report_files(None, trainer_in(tmp_path), "release", REPORT_FILES)
        assert (Path(files["json"]).parent.name, tag) == (name, name)
        Path(files["json"]).touch()


@pytest.fixture(scope="module")
def report() -> RepairReport:
    return repair_module(trained(), known(), quick()).report


def test_a_report_is_written_where_it_says(tmp_path: Path, report: RepairReport) -> None:
    report = replace(report, files=report_files(tmp_path, trainer_in(tmp_path), "repair", REPORT_FILES)[0])
    write_report(report)
    assert RepairReport.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.md").read_text() == report.to_markdown()
    assert (tmp_path / "report.html").read_text() == report.to_html()


def test_views_of_samples_lie_beside_the_report(tmp_path: Path, report: RepairReport) -> None:
    report = replace(report, files=report_files(tmp_path, trainer_in(tmp_path), "repair", REPORT_FILES)[0])
    picture = SampleView("val/0", 7, "broken", "", np.full((4, 5, 3), 128, dtype=np.uint8))
    write_report(report, [picture, SampleView("test", 2, "repaired", "", text="a film")])
    folder = tmp_path / "flipped_samples"
    assert sorted(path.name for path in folder.iterdir()) == ["test-2.txt", "val%2F0-7.png"]
    assert (folder / "val%2F0-7.png").read_bytes() == picture.png
    assert (folder / "test-2.txt").read_text() == "a film"


def test_the_headline_is_named_as_the_logs_are(report: RepairReport) -> None:
    numbers = headline(report, "repair-1")
    assert numbers["repair-1/accepted"] == float(report.status == "repaired")
    assert numbers["repair-1/known_repaired_in_target"] == sum(s.repaired_in_target for s in report.splits)
    assert all(number.shape == () for number in numbers.values())
