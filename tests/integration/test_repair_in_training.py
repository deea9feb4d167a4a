"""Repairs within a training: when they come, what they leave, and that training goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Classifier, Digits, quiet_trainer, right
from lightning_package import Callback, CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_nrl import RepairReport
from lightning_nrl.callbacks import TrainingHistory
from lightning_nrl.errors import ConfigurationError, TrainingWarning
from lightning_nrl.repair_in_training import RepairInTraining


class Watch(Callback):
    """Notes weights and what known samples are right at the start of each epoch, and at the end of the one before."""

    def __init__(self) -> None:
        self.ended: list[Any] = []
        self.began: list[Any] = []

    def look(self, model: Any) -> Any:
        data = Digits()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        return state, torch.cat([right(model, data.train), right(model, data.repair)])

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.began.append(self.look(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.is_last_batch:
            self.ended.append(self.look(pl_module))


class Scripted(Classifier):
    """Logs numbers as a metric, one in each validation."""

    def __init__(self, numbers: list[float]) -> None:
        super().__init__()
        self.numbers = numbers

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("slice", self.numbers[self.current_epoch])


def in_training(**arguments: Any) -> RepairInTraining:
    return RepairInTraining(method="convex", verbose=False, **arguments)


def fit(folder: Path, *callbacks: Any, model: Any = None, epochs: int = 4, **more: Any) -> Any:
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, *callbacks, max_epochs=epochs, **more)
    trainer.fit(Classifier() if model is None else model, datamodule=Digits())
    return trainer


def test_training_goes_on_from_what_each_repair_leaves(tmp_path: Path) -> None:
    watch, repair = Watch(), in_training(every_n_epochs=2)
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, watch, repair, epochs=5, logger=[logger, CSVLogger(tmp_path / "csv")])
    run = Path(logger.log_dir)
    names = ["repair-step-24", "repair-step-48", "repair"]
    assert [report.status for report in repair.reports] == ["repaired"] * 3
    assert [Path(report.files["json"]).parent for report in repair.reports] == [run / name for name in names]
    assert repair.report is repair.reports[-1]
    for report, epoch in zip(repair.reports[:2], (1, 3), strict=True):
        (before, was_right), (after, is_right) = watch.ended[epoch], watch.began[epoch + 1]
        assert not bool((was_right & ~is_right).any())
        assert report.pooled("known").repaired == int((~was_right & is_right).sum()) > 0
        assert any(not torch.equal(before[name], after[name]) for name in before)
        saved = torch.load(report.files["checkpoint"], weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], after[name]) for name in after)
        assert RepairReport.from_json(Path(report.files["json"]).read_text()).hashes == report.hashes
    # Without a repair an epoch begins with the weights that the one before ended with.
    assert all(torch.equal(watch.ended[0][0][name], value) for name, value in watch.began[1][0].items())
    for name, step in zip(names, (24, 48, 60), strict=True):
        events = EventAccumulator(str(run / name)).Reload()
        assert [one.step for one in events.Scalars("repair/known_broken")] == [step]


@pytest.mark.parametrize(
    ("numbers", "arguments", "steps"),
    [
        # Better, worse, as bad, worse than what the repair left.
        ([0.3, 0.2, 0.25, 0.25, 0.3], {}, [36, 60]),
        ([0.3, 0.2, 0.25, 0.25, 0.3], {"min_delta": 0.06}, [60]),
        ([0.7, 0.8, 0.7, 0.9, 0.9], {"mode": "max"}, [36]),
        ([0.3, float("nan"), 0.2, 0.25, 0.1], {"every_n_epochs": 5}, [48, 60]),
    ],
)
def test_a_metric_that_is_worse_than_its_best_calls_for_a_repair(
    numbers: list[float], arguments: dict[str, Any], steps: list[int], tmp_path: Path, monkeypatch: Any
) -> None:
    repair, found = in_training(monitor="slice", at_end=False, dirpath=tmp_path / "files", **arguments), []
    monkeypatch.setattr(RepairInTraining, "attempt", lambda *args: pytest.fail("no repair is to be searched"))
    monkeypatch.setattr(RepairInTraining, "_repair", lambda self, trainer, module: found.append(trainer.global_step))
    fit(tmp_path, repair, model=Scripted(numbers), epochs=5)
    assert found == steps


def test_a_metric_that_is_not_there_is_said(tmp_path: Path) -> None:
    repair = in_training(monitor="slice", at_end=False)
    with pytest.warns(TrainingWarning, match="nothing of that name was logged, so no repair follows it"):
        fit(tmp_path, repair, epochs=1)
    assert repair.reports == []


def test_the_last_step_is_not_repaired_twice(tmp_path: Path) -> None:
    repair = in_training(every_n_epochs=1, dirpath=tmp_path / "files")
    fit(tmp_path, repair, epochs=1)
    assert [Path(report.files["json"]).parent for report in repair.reports] == [tmp_path / "files" / "repair-step-12"]


def test_a_best_of_an_earlier_training_does_not_count(tmp_path: Path, monkeypatch: Any) -> None:
    repair, found = in_training(monitor="slice", at_end=False), []
    monkeypatch.setattr(RepairInTraining, "_repair", lambda self, trainer, module: found.append(trainer.global_step))
    for numbers in ([0.1], [0.3, 0.2]):
        fit(tmp_path, repair, model=Scripted(numbers), epochs=len(numbers))
    assert found == []


def test_a_stop_of_the_repair_at_the_end_is_not_said_to_come_after_it(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    repair, attempt = in_training(every_n_epochs=2), RepairInTraining.attempt

    def stopped(self: Any, trainer: Any, *rest: Any) -> Any:
        if self.reports:
            raise KeyboardInterrupt
        return attempt(self, trainer, *rest)

    monkeypatch.setattr(RepairInTraining, "attempt", stopped)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, repair, epochs=3, limit_train_batches=2)
    assert len(repair.reports) == 1
    said = capsys.readouterr().err
    assert "The repair was stopped" in said
    assert "The repair was over before" not in said


def test_a_record_behind_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="TrainingHistory comes after RepairInTraining"):
        fit(tmp_path, in_training(every_n_epochs=1), TrainingHistory())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "are both None"),
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"monitor": ""}, "monitor"),
        ({"monitor": "loss", "mode": "least"}, "mode"),
        ({"monitor": "loss", "min_delta": -1}, "min_delta"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        in_training(**arguments)
