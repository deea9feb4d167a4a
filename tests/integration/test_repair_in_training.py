"""Repairs within a training: when they come, what they leave, and that training goes on from it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import QUICK, Classifier, Digits, nobody, quiet_trainer, right, same, state_of
from lightning_package import (
    Callback,
    CSVLogger,
    ModelCheckpoint,
    TensorBoardLogger,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_nrl import DataOptions, RepairInTraining, Target
from lightning_nrl.errors import ConfigurationError, DataWarning, TrainingWarning


class Watch(Callback):
    """Notes weights and what known samples are right at the start of each epoch, and at the end of
    the one before.
    """

    def __init__(self) -> None:
        self.ended = []
        self.began = []

    def look(self, model: Any) -> Any:
        data = Digits()
        state = state_of(model)
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
    return RepairInTraining(**{**QUICK, **arguments})


def fit(folder: Path, *callbacks: Any, model: Any = None, epochs: int = 4, **more: Any) -> Any:
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, *callbacks, max_epochs=epochs, **more)
    trainer.fit(Classifier() if model is None else model, datamodule=Digits())
    return trainer


def test_training_goes_on_from_what_each_repair_leaves(tmp_path):
    watch, repair = Watch(), in_training(every_n_epochs=2)
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, watch, repair, epochs=5, logger=[logger, CSVLogger(tmp_path / "csv")])
    run = Path(logger.log_dir)
    names = ["repair-step-24", "repair-step-48", "repair"]
    assert [report.status for report in repair.reports] == ["repaired"] * 3
    assert [Path(report.files["json"]).parent for report in repair.reports] == [
        run / name for name in names
    ]
    assert repair.report is repair.reports[-1]
    for report, epoch in zip(repair.reports[:2], (1, 3), strict=True):
        (before, was_right), (after, is_right) = watch.ended[epoch], watch.began[epoch + 1]
        assert not bool((was_right & ~is_right).any())
        assert report.pooled("known").repaired == int((~was_right & is_right).sum()) > 0
        assert not same(before, after)
        assert same(report.files["checkpoint"], after)
    # Without a repair an epoch begins with the weights that the one before ended with.
    assert same(watch.ended[0][0], watch.began[1][0])
    events = EventAccumulator(str(run / names[1])).Reload()
    assert [event.step for event in events.Scalars("repair/known_broken")] == [48]


@pytest.mark.parametrize(
    ("numbers", "arguments", "steps"),
    [
        # Better, worse, as bad, worse than what the repair left.
        ([0.3, 0.2, 0.25, 0.25, 0.3], {}, [6, 10]),
        ([0.3, 0.2, 0.25, 0.25, 0.3], {"min_delta": 0.06}, [10]),
        ([0.7, 0.8, 0.7, 0.9, 0.9], {"mode": "max"}, [6]),
        ([0.3, float("nan"), 0.2, 0.25, 0.1], {"every_n_epochs": 5}, [8, 10]),
    ],
)
def test_a_metric_that_is_worse_than_its_best_calls_for_a_repair(
    numbers, arguments, steps, tmp_path
):
    nothing = {"target": Target.where(nobody), "dirpath": tmp_path / "files"}
    repair = in_training(monitor="slice", at_end=False, **nothing, **arguments)
    fit(tmp_path, repair, model=Scripted(numbers), epochs=5, limit_train_batches=2)
    folders = [Path(report.files["json"]).parent.name for report in repair.reports]
    assert folders == [f"repair-step-{step}" for step in steps]


def test_a_metric_that_is_not_there_is_said_but_not_of_an_epoch_without_a_validation(tmp_path):
    repair = in_training(monitor="slice", at_end=False)
    with pytest.warns(
        TrainingWarning, match="no metric of that name was logged, so it triggers no repair"
    ):
        fit(tmp_path, repair, epochs=1)
    assert repair.reports == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        fit(tmp_path, repair, model=Scripted([0.1, 0.1]), epochs=2, check_val_every_n_epoch=2)


def test_the_last_step_is_not_repaired_twice(tmp_path):
    repair = in_training(every_n_epochs=1, dirpath=tmp_path / "files")
    fit(tmp_path, repair, epochs=1)
    assert [Path(report.files["json"]).parent for report in repair.reports] == [
        tmp_path / "files" / "repair-step-12"
    ]


class Counting(Classifier):
    """Counts its epochs in a buffer, and moves its weights, when an epoch has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        self.moved = []

    def on_train_epoch_end(self) -> None:
        self.epochs += 1
        with torch.no_grad():
            self.network[1].weight.round_(decimals=2)
        self.moved.append(self.network[1].weight.clone())
        self.log("counted", float(self.epochs))


def test_what_the_module_does_when_an_epoch_ends_is_in_the_file(tmp_path):
    model, saved = (
        Counting(),
        ModelCheckpoint(tmp_path, monitor="counted", filename="{epoch}", save_top_k=-1),
    )
    # The metric is one that the module logs in the very hook.
    arguments = {"monitor": "counted", "at_end": False, "target": "label 8", "method": "convex"}
    first = in_training(dirpath=tmp_path / "first", **arguments)
    twin = in_training(every_n_epochs=2, at_end=False, dirpath=tmp_path / "twin")
    fit(tmp_path, first, twin, saved, model=model, epochs=2)
    assert "on_train_epoch_end" not in vars(model)
    assert [len(first.reports), len(twin.reports)] == [1, 1]
    found = torch.load(tmp_path / "first" / "repair-step-24" / "repaired.ckpt", weights_only=True)
    assert found["state_dict"]["epochs"] == 2
    assert torch.equal(found["state_dict"]["network.1.weight"], model.moved[1])
    assert first.reports[0].status == "repaired"
    # What saves by a metric comes after both.
    last = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert same(model, last)
    # A training that goes on from the file begins with the next epoch.
    again, path = Counting(), str(tmp_path / "first" / "repair-step-24" / "repaired.ckpt")
    resumed = in_training(dirpath=tmp_path / "again", **arguments)
    quiet_trainer(tmp_path, resumed, max_epochs=3).fit(again, datamodule=Digits(), ckpt_path=path)
    assert resumed.reports == []
    assert (int(again.epochs), len(again.moved)) == (3, 1)


class Failing(Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        copy.deepcopy(pl_module).on_train_epoch_end()  # a copy's hook is not followed
        raise ArithmeticError


def test_the_module_has_its_own_hook_after_an_error(tmp_path):
    model = Classifier()
    repairs = [
        in_training(every_n_epochs=1, target=target, dirpath=tmp_path)
        for target in ("label 3", "label 8")
    ]
    with pytest.raises(ArithmeticError):
        fit(tmp_path, *repairs, Failing(), model=model, epochs=1)
    assert "on_train_epoch_end" not in vars(model)
    assert [repair.reports for repair in repairs] == [[], []]


class Wrong(Classifier):
    """Logs how many samples of the validation data it gets wrong, and notes when."""

    def __init__(self) -> None:
        super().__init__()
        self.validated = []

    def on_validation_epoch_end(self) -> None:
        wrong = int((~right(self, Digits().val)).sum())
        self.log("wrong", float(wrong))
        if not self.trainer.sanity_checking:
            self.validated.append((self.trainer.global_step, wrong))


def test_the_best_is_that_of_the_repaired_model(tmp_path):
    model = Wrong()
    best = ModelCheckpoint(tmp_path, monitor="wrong", filename="{epoch}", save_top_k=-1)
    repair = in_training(
        every_n_epochs=2,
        monitor="wrong",
        min_delta=1000,
        at_end=False,
        data=DataOptions(failed="val"),
    )
    fit(tmp_path, repair, best, model=model, epochs=3)
    (_, first), (at, before), (again, after), (_, last) = model.validated
    assert [report.status for report in repair.reports] == ["repaired"]
    assert (at, again) == (24, 24)
    assert after < before
    key = repair.state_key
    files = {
        epoch: torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        for epoch in (0, 1, 2)
    }
    bests = [files[epoch]["callbacks"][key]["best"] for epoch in (0, 1, 2)]
    assert bests == [first, after, min(after, last)]
    # Whoever saves by the metric knows that of the weights that are saved.
    assert files[1]["callbacks"][best.state_key]["current_score"] == after


def test_two_of_the_same_layer_and_target_are_refused(tmp_path):
    twins = [in_training(every_n_epochs=n, layer="network.3") for n in (1, 2)]
    with pytest.raises(
        ConfigurationError, match="there are 2 RepairInTraining of the same layer and target"
    ):
        fit(tmp_path, *twins)


@pytest.mark.parametrize(
    ("state", "best", "said"),
    [
        ({"best": 0.25}, 0.25, None),
        ({}, None, None),
        ({"report": 3}, None, "the report in the checkpoint cannot be read"),
    ],
)
def test_a_state_is_read_or_warned_of_and_costs_nothing(state, best, said):
    repair = in_training(monitor="slice")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        repair.load_state_dict(state)
    assert [type(one.message) for one in caught] == ([] if said is None else [DataWarning])
    assert said is None or said in str(caught[0].message)
    assert (repair._best, repair.report) == (best, None)
