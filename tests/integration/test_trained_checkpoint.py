"""`repair(trainer, model, ...)`: a trained model is repaired without training."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    QUICK,
    Classifier,
    Digits,
    Untrainable,
    quick_repair,
    quiet_trainer,
    right,
    same,
    state_of,
)
from lightning_package import (
    EarlyStopping,
    LearningRateFinder,
    LightningDataModule,
    ModelCheckpoint,
    Trainer,
)
from options import with_options

from lightning_nrl import ConfigurationError, DataOptions, RepairReport, Target, diagnose, repair
from lightning_nrl.errors import TrainingWarning
from lightning_nrl.evaluation import FlipCounts
from lightning_nrl.gate import Instance
from lightning_nrl.pipeline import Patch


def repaired(path: Path, model: Classifier, *loaders: Any, **arguments: Any) -> RepairReport:
    return repair(quiet_trainer(path), model, *loaders, **with_options({**QUICK, **arguments}))


def without_times(report: RepairReport) -> RepairReport:
    steps = tuple(replace(step, seconds=0.0) for step in report.steps)
    return replace(
        report, seconds={}, files={}, steps=steps, provenance=report.provenance.loaded_from("")
    )


def test_the_report_is_that_of_the_callback_after_training(tmp_path, trained_path):
    callback, model = quick_repair(unseen="test"), Classifier()
    quiet_trainer(tmp_path / "fit", callback).fit(model, datamodule=Digits())
    report = repaired(
        tmp_path, other := Classifier(), datamodule=Digits(), ckpt_path=trained_path, unseen="test"
    )
    assert report.status == "repaired"
    assert without_times(report) == without_times(callback.report)
    assert same(model, other)
    trained, loaded = callback.report.provenance, report.provenance
    assert trained.checkpoint == trained.checkpoint_sha256 == ""
    assert loaded.checkpoint == str(trained_path)
    assert loaded.checkpoint_sha256 == sha256(trained_path.read_bytes()).hexdigest()
    assert loaded.module == "digit_models.Classifier"


def test_the_repaired_checkpoint_and_the_patch_are_made_of_the_trained_one(tmp_path, trained_path):
    report = repaired(tmp_path, model := Classifier(), datamodule=Digits(), ckpt_path=trained_path)
    old, new = (
        torch.load(path, weights_only=True) for path in (trained_path, report.files["checkpoint"])
    )
    assert new["global_step"] == old["global_step"] == 36
    assert new["epoch"] == old["epoch"]
    assert new["loops"]["fit_loop"] == old["loops"]["fit_loop"]
    torch.testing.assert_close(new["optimizer_states"], old["optimizer_states"], rtol=0, atol=0)
    assert same(new["state_dict"], model)
    changed = [
        name
        for name, value in old["state_dict"].items()
        if not torch.equal(new["state_dict"][name], value)
    ]
    assert changed == ["network.3.weight"]
    patch = Patch.load(report.files["patch"])
    assert patch.report == report
    assert patch.names == ("network.3.weight",)
    assert (patch.base, patch.result) == (report.hashes.model_before, report.hashes.model_after)
    assert same(dict(patch.apply(old["state_dict"])), new["state_dict"])
    assert same(dict(patch.revert(new["state_dict"])), old["state_dict"])
    # Both training and a repair go on from it; the files of the first are left alone.
    trainer = quiet_trainer(tmp_path, max_epochs=4)
    trainer.fit(Classifier(), datamodule=Digits(), ckpt_path=report.files["checkpoint"])
    assert trainer.global_step == 48
    second = repaired(
        tmp_path, Classifier(), datamodule=Digits(), ckpt_path=report.files["checkpoint"]
    )
    assert second.hashes.model_before == report.hashes.model_after
    assert Path(second.files["json"]).parent == tmp_path / "repair-1"


class SelfContained(Classifier):
    def train_dataloader(self) -> Any:
        return Digits().train_dataloader()

    def val_dataloader(self) -> Any:
        return Digits().repair_dataloader()


class SlowToLoad(Classifier):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        time.sleep(1)


def test_the_time_to_load_counts_too(tmp_path, trained_path):
    arguments = {"datamodule": Digits(), "ckpt_path": trained_path, "max_time": 1}
    report = repaired(tmp_path, SlowToLoad(), **arguments)
    assert report.status == "not repaired"
    assert report.reason.startswith("no time was left for a search after ")
    assert next(iter(report.seconds.items())) > ("load", 1.0)


class OtherGroups(Classifier):
    """Has a group of parameters for each of them, since it was trained."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": parameter} for parameter in self.parameters()])


@pytest.mark.parametrize(("kind", "weights_only"), [(Classifier, True), (OtherGroups, False)])
def test_states_of_optimizers_that_are_missing_or_do_not_fit_cost_no_repair(
    tmp_path, kind, weights_only
):
    trainer = quiet_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(Classifier(), datamodule=Digits())
    trainer.save_checkpoint(path := tmp_path / "a.ckpt", weights_only=weights_only)
    with pytest.warns(TrainingWarning, match="the states of its optimizers cannot be loaded"):
        report = repaired(tmp_path, kind(), datamodule=Digits(), ckpt_path=path)
    assert report.status == "repaired"
    new = torch.load(report.files["checkpoint"], weights_only=True)
    assert new["global_step"] == 36
    assert [state["state"] for state in new["optimizer_states"]] == [{}]


def test_data_loaders_arguments_and_the_model_may_give_the_data(tmp_path, trained_path):
    data, model = Digits(), Classifier.load_from_checkpoint(trained_path)
    report = repaired(tmp_path, model, data.train_dataloader(), data.repair_dataloader())
    assert [(split.split, split.n) for split in report.splits] == [("train", 400), ("val", 203)]
    report = repaired(tmp_path, SelfContained.load_from_checkpoint(trained_path))
    assert [(split.split, split.n) for split in report.splits] == [("train", 400), ("val", 203)]


class Idle(Untrainable):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("validation has begun")


def test_the_model_is_repaired_as_it_is_and_nothing_is_trained(tmp_path, trained_path):
    model = Idle.load_from_checkpoint(trained_path)
    trainer, old = (
        quiet_trainer(tmp_path, finder := LearningRateFinder()),
        model.network[3].weight.detach().clone(),
    )
    report = repair(trainer, model, datamodule=Digits(), target=Target.label(3), **QUICK)
    assert (report.status, report.target) == ("repaired", "label 3")
    assert int((model.network[3].weight != old).sum()) == report.change.changed > 0
    assert finder in trainer.callbacks


def settings(trainer: Trainer) -> dict[str, Any]:
    return {
        "callbacks": list(trainer.callbacks),
        "sanity": trainer.num_sanity_val_steps,
        "max_epochs": trainer.max_epochs,
        "stop": trainer.should_stop,
        "min_epochs": trainer.min_epochs,
    }


class Asking(Classifier):
    """Brings a callback of its own, and tells how training goes."""

    def configure_callbacks(self) -> Any:
        return [EarlyStopping("loss", check_on_train_epoch_end=True)]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("kind", [Asking, lambda: torch.compile(Classifier(), backend="eager")])
def test_the_trainer_is_as_before_and_can_train(tmp_path, kind):
    trainer, model = quiet_trainer(tmp_path, ModelCheckpoint(tmp_path), max_epochs=1), kind()
    before, random = settings(trainer), torch.get_rng_state()
    repair(trainer, model, datamodule=Digits(), **QUICK)
    assert settings(trainer) == before
    assert torch.equal(torch.get_rng_state(), random)
    trainer.fit(model, datamodule=Digits())
    assert trainer.global_step == 12


def test_a_module_compiled_as_a_whole_is_diagnosed_and_repaired_by_what_it_computes(
    tmp_path, trained
):
    data, before = Digits(), right(trained, Digits().repair)
    model = torch.compile(trained, backend="aot_eager")
    found = diagnose(quiet_trainer(tmp_path), model, datamodule=data)
    assert found.head == "network.3"
    assert len(found.targets) == int((~before).sum())
    report = repaired(tmp_path, model, datamodule=data)
    (counts,) = [split.counts for split in report.splits if split.split == "repair"]
    assert (report.status, counts.broken) == ("repaired", 0)
    for deployed in (model, Classifier.load_from_checkpoint(report.files["checkpoint"])):
        after = right(deployed, data.repair)
        assert (int((before & ~after).sum()), int((after & ~before).sum())) == (0, counts.repaired)


def test_an_exception_leaves_neither_callback_nor_trace(tmp_path, trained):
    class Broken(Instance):
        def allowed(self, counts: FlipCounts) -> int:
            raise ArithmeticError

    trainer, old = quiet_trainer(tmp_path), state_of(trained)
    before = settings(trainer)
    with pytest.raises(ArithmeticError):
        repair(trainer, trained, datamodule=Digits(), gate=Broken(), **QUICK)
    assert settings(trainer) == before
    assert same(trained, old)


@pytest.mark.parametrize(
    ("of_trainer", "arguments", "message"),
    [
        ({"min_steps": 1}, {}, "`trainer` has `min_epochs` or `min_steps`"),
        ({}, {"callback": quick_repair(), "seed": 1}, r"`callback` was given, and \['seed'\] too"),
        ({}, {"layer": "network.9"}, r"`layer='network\.9'` is not in the model"),
        (
            {},
            {"data": DataOptions(start_from="best")},
            r"`start_from='best'`[\s\S]*HINT: [\s\S]*`ckpt_path`",
        ),
        ({}, {"ckpt_path": "none.ckpt"}, r"`ckpt_path='none\.ckpt'` cannot be read \(FileNotFound"),
    ],
)
def test_bad_input_is_refused(tmp_path, trained, of_trainer, arguments, message):
    trainer = quiet_trainer(tmp_path, **of_trainer)
    before, old = settings(trainer), state_of(trained)
    with pytest.raises(ConfigurationError, match=message):
        repair(trainer, trained, datamodule=Digits(), **arguments)
    assert settings(trainer) == before
    assert same(trained, old)


def test_a_trainer_that_would_not_train_repairs(tmp_path, trained_path):
    limits = {"max_epochs": 0, "limit_train_batches": 0, "limit_val_batches": 0}
    data, trainer = Digits(), quiet_trainer(tmp_path, **limits)
    loaders = data.train_dataloader(), data.val_dataloader()
    # The checkpoint has more epochs than the trainer.
    report = repair(trainer, Classifier(), *loaders, ckpt_path=trained_path, **QUICK)
    assert [split.n for split in report.splits] == [400, 100]
    assert trainer.max_epochs == 0


def test_loaders_may_be_partial_functions_of_the_data_module(tmp_path, trained):
    digits, data = Digits(), LightningDataModule()
    for name in ("train", "val", "test"):
        hook = partial(getattr(digits, f"{name}_dataloader"))
        setattr(data, f"{name}_dataloader", hook)
    report = repaired(tmp_path, trained, datamodule=data, unseen="test")
    assert [split.split for split in report.splits] == ["train", "val", "test"]


def test_untrained_weights_are_said_and_trained_ones_are_not(tmp_path, trained, recwarn):
    def said() -> list[str]:
        return [str(w.message) for w in recwarn if "`ckpt_path` is None" in str(w.message)]

    repaired(tmp_path, trained, datamodule=Digits())
    assert not said()
    repaired(tmp_path, Classifier(), datamodule=Digits())
    (text,) = said()
    assert "of the known samples right, no more than chance" in text
    assert "ckpt_path='best.ckpt'" in text
