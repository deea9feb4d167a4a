"""A training with its record: exact, without a trace in the training, through a resume, over two
processes.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import QUICK, Classifier, Digits, quick_repair, quiet_trainer, same, state_of
from distributed_fit import Frozen
from lightning_package import CSVLogger, ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from two_processes import in_two_processes

from lightning_nrl import RegressionFreeRepair, RepairInTraining, SearchOptions
from lightning_nrl.errors import ConfigurationError, FilesWarning
from lightning_nrl.published import (
    NeuRecover,
    TrainingHistory,
    TrainingRecord,
    bundle,
    training_record,
)


def fit(folder: Path, *callbacks: Any, epochs: int = 3, ckpt_path: Any = None, **more: Any) -> Any:
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, *callbacks, max_epochs=epochs, **more)
    trainer.fit(Classifier(), datamodule=Digits(), ckpt_path=ckpt_path)
    return trainer


def outputs(weights: dict[str, torch.Tensor], split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples of a split these weights get right, and their losses."""
    model = Classifier().eval()
    model.load_state_dict(weights)
    images, labels, _ = getattr(Digits(), split).tensors
    with torch.no_grad():
        logits = model(images)
    return logits.argmax(1) == labels, F.cross_entropy(logits, labels, reduction="none")


def check_points(record: TrainingRecord, **sizes: int) -> None:
    """Each point is what its weights do on every sample of the splits."""
    for split, n in sizes.items():
        found = record.splits[split]
        assert found.index.tolist() == list(range(n))
        assert found.passed.shape == (len(record.points), n)
        for i, point in enumerate(record.points):
            right, loss = (x[:n] for x in outputs(dict(point.weights), split))
            assert torch.equal(found.passed[i], right)
            torch.testing.assert_close(found.loss[i].float(), loss, rtol=2e-3, atol=1e-6)


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, TrainingRecord, Any]:
    folder = tmp_path_factory.mktemp("recorded")
    history = TrainingHistory(["train", "val", "repair"], layers="all", dirpath=folder / "history")
    repair = RegressionFreeRepair(
        method=bundle("neurecover", searcher="swarm"), verbose=False, gate="accuracy"
    )
    trainer = fit(folder, history, repair, logger=CSVLogger(folder))
    return folder, TrainingRecord.read(folder / "history"), trainer


def test_each_point_is_what_its_weights_do_on_every_sample(recorded):
    _, record, _ = recorded
    assert [point.epoch for point in record.points] == [0, 1, 2]
    check_points(record, train=400, val=100)


def test_the_training_does_not_notice(recorded, tmp_path):
    _, record, _ = recorded
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(tmp_path, checkpoint)
    plain = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    assert same(dict(record.points[-1].weights), plain)


def test_curves_of_learning_and_forgetting_go_to_the_loggers(recorded):
    folder, record, _ = recorded
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        *_, last = (row for row in csv.DictReader(file) if row["history/val/learned"])
    passed, label = record.splits["val"].passed, record.splits["val"].label
    learned, forgotten = passed[-1], passed.any(0) & ~passed[-1]
    assert float(last["history/val/learned"]) == int(learned.sum())
    assert float(last["history/val/forgotten"]) == int(forgotten.sum())
    assert float(last["history_val/learned/3"]) == int(learned[label == 3].sum())


def test_without_a_record_neurecover_says_what_is_missing_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match="put a `TrainingHistory`"):
        fit(tmp_path, quick_repair(search=SearchOptions(localizer=NeuRecover())))


def test_a_resumed_training_goes_on_with_its_record(tmp_path):
    history = TrainingHistory("val", every_n_epochs=1)
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", save_top_k=-1, filename="{epoch}")
    fit(tmp_path, history, checkpoint, epochs=3, logger=CSVLogger(tmp_path))
    first = TrainingRecord.read(history.folder)
    again = TrainingHistory("val")
    resumed = str(tmp_path / "saved" / "epoch=1.ckpt")
    fit(tmp_path, again, epochs=4, logger=CSVLogger(tmp_path), ckpt_path=resumed)
    second = TrainingRecord.read(again.folder)
    assert again.folder == history.folder
    assert [point.epoch for point in second.points] == [0, 1, 2, 3]
    assert torch.equal(second.splits["val"].passed[:2], first.splits["val"].passed[:2])
    fit(tmp_path, anew := TrainingHistory("val", dirpath=history.folder), epochs=1)
    assert [point.epoch for point in TrainingRecord.read(anew.folder).points] == [0]


def test_a_full_disk_costs_a_point_and_no_training(tmp_path, monkeypatch):
    written = []
    replacing = training_record.replacing

    def fill(path: Path, write: Any) -> None:
        written.append(path)
        if len(written) == 3:  # the samples and the first epoch are there
            raise OSError(28, "No space left on device")
        replacing(path, write)

    monkeypatch.setattr(training_record, "replacing", fill)
    with pytest.warns(FilesWarning, match=r"could not write step .*No space left"):
        trainer = fit(tmp_path, TrainingHistory(dirpath=tmp_path / "history"))
    assert trainer.current_epoch == 3
    assert [point.epoch for point in TrainingRecord.read(tmp_path / "history").points] == [0, 2]


class Odd(Digits):
    """As many training samples as two processes cannot share evenly, so that one is there twice."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Subset(self.train, range(101)), 8, shuffle=True)


def on_rank(folder: Path) -> dict[str, torch.Tensor]:
    """The weights after a training with its record and with repairs in it, by a rank of two."""
    history = TrainingHistory(["train", "val", "repair"], layers="all", dirpath=folder / "history")
    when = {"every_n_epochs": 1, "monitor": "val_loss", "min_delta": 1000.0, "at_end": False}
    repair = RepairInTraining(**when, dirpath=folder / "files", **QUICK)
    trainer = quiet_trainer(folder, history, repair, devices=2, strategy="ddp", max_epochs=2)
    # Only repairs move its weights, so that what each sample met in training can be found again.
    trainer.fit(model := Frozen(), datamodule=Odd())
    return state_of(model)


def test_two_processes_record_each_sample_once(tmp_path):
    states = in_two_processes(on_rank, tmp_path)
    record = TrainingRecord.read(tmp_path / "history")
    assert len(record.points) == 2
    # The repair after the first epoch is what the second was trained with, that after the second is
    # on both ranks.
    first, second = (dict(point.weights) for point in record.points)
    repaired = [tmp_path / "files" / f"repair-step-{step}" / "repaired.ckpt" for step in (7, 14)]
    saved = [path for path in repaired if path.exists()]
    assert same(states[0], states[1])
    assert not same(first, second)
    assert same(saved[0], second)
    assert same(saved[-1], states[0])
    check_points(record, train=101, val=100, repair=203)
