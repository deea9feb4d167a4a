"""The repair is the last change of a fit; a later one is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Classifier, Few, quick_repair, quiet_trainer, right, same, state_of
from lightning_package import Callback, Trainer

from lightning_nrl import ParticleSwarm, RepairInTraining, repair
from lightning_nrl.errors import TrainingWarning

QUICK = {"method": ParticleSwarm(20, 20), "verbose": False}


class Averaged(Classifier):
    """Has an average of its weights, and puts it into the model in one of its hooks."""

    swaps_in: str = ""

    def on_train_start(self) -> None:
        self.average = state_of(self)

    def on_train_batch_end(self, *args: Any) -> None:
        for name, value in self.state_dict().items():
            self.average[name].lerp_(value, 0.1)

    def swap(self, hook: str) -> None:
        if hook == self.swaps_in:
            self.load_state_dict(self.average)

    def on_train_end(self) -> None:
        self.swap("on_train_end")

    def on_fit_end(self) -> None:
        self.swap("on_fit_end")

    def teardown(self, stage: str) -> None:
        self.swap("teardown")


class Swap(Callback):
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            pl_module.network[-1].weight.mul_(0.9)


def fit(folder: Path, *callbacks: Callback, model: Any = None) -> None:
    quiet_trainer(folder, *callbacks, max_epochs=2).fit(model or Classifier(), datamodule=Few())


def undone(recwarn: pytest.WarningsRecorder) -> list[str]:
    return [str(w.message) for w in recwarn if "the fit ends with other weights" in str(w.message)]


@pytest.mark.parametrize("in_training", [False, True])
def test_a_repair_follows_the_modules_own_hook(tmp_path, in_training, recwarn):
    model = Averaged()
    model.swaps_in = "on_train_end"
    callback = quick_repair(**QUICK)
    if in_training:
        callback = RepairInTraining(every_n_epochs=9, **QUICK)
    fit(tmp_path, callback, model=model)
    assert callback.report.status == "repaired"
    assert same(model, callback.repaired_model_path)
    old, new = Classifier(), right(model, Few().train)
    old.load_state_dict(model.average)
    assert new[right(old, Few().train)].all()
    assert not undone(recwarn)
    assert "on_train_end" not in vars(model)


@pytest.mark.parametrize("hook", ["on_fit_end", "teardown"])
def test_a_later_hook_of_the_module_is_said(tmp_path, hook):
    model, callback = Averaged(), quick_repair(**QUICK)
    model.swaps_in = hook
    with pytest.warns(TrainingWarning, match="other weights than the repaired") as record:
        fit(tmp_path, callback, model=model)
    assert callback.repaired_model_path in str(record[-1].message)
    assert not same(model, callback.repaired_model_path)


def test_a_later_callback_is_said(tmp_path, recwarn):
    for callbacks in ([Swap(), quick_repair(**QUICK)], [quick_repair(**QUICK), Swap()]):
        assert not undone(recwarn)
        fit(tmp_path, *callbacks)
    assert len(undone(recwarn)) == 1


def test_a_second_repair_undoes_nothing(tmp_path, recwarn):
    callbacks = [quick_repair(target=f"label {label}", **QUICK) for label in (3, 8)]
    fit(tmp_path, *callbacks)
    assert any(callback.repaired_model_path for callback in callbacks)
    assert not undone(recwarn)


def test_a_repair_without_training_says_it_too(tmp_path, trained):
    model = Averaged()
    model.load_state_dict(trained.state_dict())
    model.average, model.swaps_in = state_of(model), "on_fit_end"
    with pytest.warns(TrainingWarning, match="other weights than the repaired"):
        repair(quiet_trainer(tmp_path), model, datamodule=Few(), **QUICK)
