"""The files of a repair and its state in a trainer: folders, reports, starting weights, and how
long it trained.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_package import (
    BoringModel,
    LightningModule,
    ModelCheckpoint,
    RandomDataset,
    quiet_trainer,
)
from torch import nn
from torch.utils.data import DataLoader
from toy_repairs import known, quick, trained

from lightning_nrl import ConfigurationError, RepairReport, repair_module
from lightning_nrl._trainer.output.folders import check_folder, report_files
from lightning_nrl._trainer.output.repair_files import REPORT_FILES, SavedFiles
from lightning_nrl._trainer.output.result_box import ResultBox
from lightning_nrl._trainer.trainer_state import epochs_of, starting_weights
from lightning_nrl.errors import UnwritableFolderError
from lightning_nrl.report.sample_views import SampleView


def trainer_in(folder: Any, logger: Any = None) -> Any:
    return SimpleNamespace(
        loggers=[logger] if logger else [],
        default_root_dir=folder,
        fast_dev_run=0,
        is_global_zero=True,
        strategy=SimpleNamespace(broadcast=lambda x: x),
    )


def folder_of(dirpath: Any, trainer: Any, name: str = "repair") -> tuple[Path, str]:
    """Where the files of a report go, and its name in logs."""
    files, tag = report_files(dirpath, trainer, name, REPORT_FILES)
    (folder,) = {Path(path).parent for path in files.values()}
    return folder, tag


def test_the_log_folder_goes_before_the_root_folder(tmp_path):
    remote = SimpleNamespace(log_dir=None, save_dir=None, name="digits", version="x7k2")
    local = SimpleNamespace(log_dir=None, save_dir=str(tmp_path / "runs"), name=None, version=3)
    for logger, folder in (
        (None, "repair"),
        (SimpleNamespace(log_dir=str(tmp_path / "version_0")), "version_0/repair"),
        (remote, "digits/x7k2/repair"),
        (local, "runs/version_3/repair"),
    ):
        assert folder_of(None, trainer_in(tmp_path, logger))[0] == tmp_path / folder


def test_a_folder_with_a_report_is_left_alone_unless_the_user_named_it(tmp_path):
    for name in ("release", "release-1", "release-2"):
        folder, tag = folder_of(None, trainer_in(tmp_path), "release")
        assert (folder, tag) == (tmp_path / name, name)
        (folder / "report.json").touch()
        assert folder_of(tmp_path / "mine", trainer_in(tmp_path)) == (tmp_path / "mine", "repair")
        (tmp_path / "mine" / "report.json").touch()


@pytest.mark.parametrize(("dirpath", "root"), [("s3://bucket/a", "."), (None, "gs://bucket/a")])
def test_a_folder_that_is_not_local_is_refused(dirpath, root):
    with pytest.raises(
        ConfigurationError, match=r"`dirpath`: [\s\S]*://bucket/a', which is no local folder"
    ):
        folder_of(dirpath, trainer_in(root))


@pytest.mark.parametrize("name", ["a\0b", 300 * "a"])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path, name):
    with pytest.raises(UnwritableFolderError, match=r"`dirpath`: .* cannot be written to"):
        check_folder(tmp_path / "new" / name, trainer_in(tmp_path))
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def report() -> RepairReport:
    return repair_module(trained(), known(), quick()).report


def test_a_report_is_written_where_it_says_with_views_of_samples_beside(tmp_path, report):
    report = replace(
        report, files=report_files(tmp_path, trainer_in(tmp_path), "repair", REPORT_FILES)[0]
    )
    picture = SampleView("val/0", 7, "broken", "", np.full((4, 5, 3), 128, dtype=np.uint8))
    with SavedFiles(report.files) as files:
        files.reports(report, [picture, SampleView("test", 2, "repaired", "", text="a film")])
        files.commit()
    assert RepairReport.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.md").read_text() == report.to_markdown()
    folder = tmp_path / "flipped_samples"
    assert sorted(path.name for path in folder.iterdir()) == ["test-2.txt", "val%2F0-7.png"]
    assert (folder / "val%2F0-7.png").read_bytes() == picture.png
    assert (folder / "test-2.txt").read_text() == "a film"


def test_a_text_of_another_process_is_taken_once_and_no_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    box, process = ResultBox(), os.getpid()
    box.put(lambda: pytest.fail("nobody waits for it"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process + 1)
        box.put(lambda: "of another")
        assert box.take() == ""
    assert (box.take(), box.take()) == ("of another", "")
    assert not list(tmp_path.iterdir())


class Slim(LightningModule):
    """Leaves its frozen part out of checkpoints."""

    strict_loading = False

    def __init__(self, value: float) -> None:
        super().__init__()
        self.head, self.frozen = nn.Linear(2, 2), nn.BatchNorm1d(2)
        nn.init.constant_(self.head.weight, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {
            name: x
            for name, x in super().state_dict(*args, **kwargs).items()
            if not name.startswith("frozen")
        }


class Best:
    """As much of a trainer as going back to the best checkpoint needs."""

    world_size = 1

    def __init__(self, model: LightningModule) -> None:
        self.checkpoint_callback = ModelCheckpoint()
        self.checkpoint_callback.best_model_path = "best.ckpt"
        self.strategy = SimpleNamespace(
            checkpoint_io=None,
            load_checkpoint=lambda path: Slim(2.0).state_dict(),
            load_model_state_dict=lambda state, strict: model.load_state_dict(state, strict=strict),
        )


@pytest.mark.parametrize(("keep", "value"), [(False, 1.0), (True, 2.0)])
def test_the_weights_of_training_come_back_unless_the_repaired_ones_stay(keep, value):
    model = Slim(1.0)
    trainer = Best(model)
    weight, statistics = model.head.weight, model.frozen.running_mean
    with starting_weights("best", trainer, model) as start:
        assert torch.equal(model.head.weight, torch.full((2, 2), 2.0))
        start.keep = keep
    assert model.head.weight is weight
    assert model.frozen.running_mean is statistics
    assert torch.equal(weight, torch.full((2, 2), value))


@pytest.mark.parametrize(
    ("limits", "epochs"),
    [({}, 3), ({"limit_train_batches": 2}, 2), ({"max_steps": 1}, 1), ({"max_steps": 9}, 2)],
)
def test_training_is_as_long_as_its_epochs_add_up_to(limits, epochs):
    """An epoch has 4 batches."""
    trainer = quiet_trainer(max_epochs=3, **limits)
    four_batches = DataLoader(RandomDataset(32, 64), batch_size=16)
    trainer.fit(BoringModel(), four_batches)
    assert epochs_of(trainer) == epochs
