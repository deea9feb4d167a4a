"""`repair(trainer, model, ...)`: a trained model is repaired without training."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import QUICK, Classifier, Digits, Untrainable, quick_repair, quiet_trainer, right
from lightning_package import CSVLogger, EarlyStopping, LearningRateFinder, ModelCheckpoint, Trainer
from options import with_options

from lightning_nrl import ConfigurationError, DataOptions, RepairReport, Target, repair
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.evaluation import FlipCounts
from lightning_nrl.gate import Instance
from lightning_nrl.pipeline import Patch


def repaired(path: Path, model: Classifier, *loaders: Any, **arguments: Any) -> RepairReport:
    return repair(quiet_trainer(path), model, *loaders, **with_options({**QUICK, **arguments}))


def without_times(report: RepairReport) -> RepairReport:
    steps = tuple(replace(step, seconds=0.0) for step in report.steps)
    return replace(report, seconds={}, files={}, steps=steps)


def test_the_report_is_that_of_the_callback_after_training(tmp_path: Path, trained_path: Path) -> None:
    callback, model = quick_repair(unseen="test"), Classifier()
    quiet_trainer(tmp_path / "fit", callback).fit(model, datamodule=Digits())
    report = repaired(tmp_path, other := Classifier(), datamodule=Digits(), ckpt_path=trained_path, unseen="test")
    assert report.status == "repaired"
    assert without_times(report) == without_times(callback.report)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_repaired_checkpoint_has_the_state_of_training(tmp_path: Path, trained_path: Path) -> None:
    report = repaired(tmp_path, model := Classifier(), datamodule=Digits(), ckpt_path=trained_path)
    old, new = (torch.load(path, weights_only=True) for path in (trained_path, report.files["checkpoint"]))
    assert new["global_step"] == old["global_step"] == 36
    assert new["epoch"] == old["epoch"]
    assert new["loops"]["fit_loop"] == old["loops"]["fit_loop"]
    torch.testing.assert_close(new["optimizer_states"], old["optimizer_states"], rtol=0, atol=0)
    assert all(torch.equal(new["state_dict"][name], value) for name, value in model.state_dict().items())
    changed = [name for name, value in old["state_dict"].items() if not torch.equal(new["state_dict"][name], value)]
    assert changed == ["network.3.weight"]


def test_the_patch_makes_one_checkpoint_of_the_other(tmp_path: Path, trained_path: Path) -> None:
    report = repaired(tmp_path, Classifier(), datamodule=Digits(), ckpt_path=trained_path)
    old, new = (
        torch.load(path, weights_only=True)["state_dict"] for path in (trained_path, report.files["checkpoint"])
    )
    patch = Patch.load(report.files["patch"])
    assert patch.report == report
    assert patch.names == ("network.3.weight",)
    assert (patch.base, patch.result) == (report.hashes.model_before, report.hashes.model_after)
    assert hash_tensors(patch.apply(old)) == hash_tensors(new)
    assert hash_tensors(patch.revert(new)) == hash_tensors(old)


def test_training_goes_on_from_it(tmp_path: Path, trained_path: Path) -> None:
    report = repaired(tmp_path, Classifier(), datamodule=Digits(), ckpt_path=trained_path)
    again = quick_repair()
    trainer = quiet_trainer(tmp_path, again, max_epochs=4)
    trainer.fit(Classifier(), datamodule=Digits(), ckpt_path=report.files["checkpoint"])
    assert trainer.global_step == 48
    assert again.report.hashes.model_before != report.hashes.model_after


def test_data_loaders_will_do_in_place_of_a_data_module(tmp_path: Path, trained: Classifier) -> None:
    data = Digits()
    before = right(trained, data.repair)
    report = repaired(tmp_path, trained, data.train_dataloader(), data.repair_dataloader())
    assert [(split.split, split.n) for split in report.splits] == [("train", 400), ("val", 203)]
    after = right(trained, data.repair)
    assert report.splits[1].repaired_ids == tuple((~before & after).nonzero().flatten().tolist())


def test_data_may_be_given_by_argument_alone(tmp_path: Path, trained: Classifier) -> None:
    data = Digits()
    report = repaired(
        tmp_path, trained, data.train_dataloader(), passed=data.val_dataloader(), failed=data.repair_dataloader()
    )
    assert [(split.split, split.n) for split in report.splits] == [("passed", 100), ("failed", 203)]


def test_a_model_that_holds_its_own_data_will_do(tmp_path: Path, trained_path: Path) -> None:
    class SelfContained(Classifier):
        def train_dataloader(self) -> Any:
            return Digits().train_dataloader()

        def val_dataloader(self) -> Any:
            return Digits().repair_dataloader()

    report = repaired(tmp_path, SelfContained.load_from_checkpoint(trained_path))
    assert [(split.split, split.n) for split in report.splits] == [("train", 400), ("val", 203)]


def test_without_a_checkpoint_the_model_is_repaired_as_it_is(tmp_path: Path, trained: Classifier) -> None:
    old = trained.network[3].weight.detach().clone()
    report = repaired(tmp_path, trained, datamodule=Digits(), target=Target.label(3))
    changed = trained.network[3].weight != old
    assert int(changed.sum()) == report.change.changed > 0
    assert report.target == "label 3"


def test_nothing_is_trained_or_validated(tmp_path: Path, trained_path: Path) -> None:
    class Idle(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError

        validation_step = training_step  # type: ignore[assignment]

    report = repaired(tmp_path, Idle.load_from_checkpoint(trained_path), datamodule=Digits())
    assert report.status == "repaired"


def settings(trainer: Trainer) -> dict[str, Any]:
    return {
        "callbacks": list(trainer.callbacks),  # type: ignore[attr-defined]
        "sanity": trainer.num_sanity_val_steps,
        "max_epochs": trainer.max_epochs,
        "stop": trainer.should_stop,
        "min_epochs": trainer.min_epochs,
    }


def test_the_trainer_is_as_before_and_can_train(tmp_path: Path, trained: Classifier) -> None:
    trainer = quiet_trainer(tmp_path, ModelCheckpoint(tmp_path), max_epochs=1)
    before = settings(trainer)
    repair(trainer, trained, datamodule=Digits(), **QUICK)
    assert settings(trainer) == before
    trainer.fit(Classifier(), datamodule=Digits())
    assert trainer.global_step == 12


class Asking(Classifier):
    """Brings a callback of its own, and tells how training goes."""

    def configure_callbacks(self) -> Any:
        return [EarlyStopping("loss", check_on_train_epoch_end=True)]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def test_a_trainer_whose_module_brings_callbacks_can_train_afterwards(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    before, model = settings(trainer), Asking()
    repair(trainer, model, datamodule=Digits(), **QUICK)
    assert settings(trainer) == before
    trainer.fit(model, datamodule=Digits())
    assert trainer.global_step == 12


def test_the_random_state_and_what_the_trainer_knows_of_training_are_as_before(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(model := Asking(), datamodule=Digits())
    loss, random = trainer.callback_metrics["loss"], torch.get_rng_state()
    repair(trainer, model, datamodule=Digits(), **QUICK)
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.callback_metrics["loss"] == trainer.logged_metrics["loss"] == loss
    assert "repair/accepted" in trainer.callback_metrics


def test_nothing_is_tuned(tmp_path: Path, trained_path: Path) -> None:
    model = Untrainable.load_from_checkpoint(trained_path)
    trainer = quiet_trainer(tmp_path, finder := LearningRateFinder())
    assert repair(trainer, model, datamodule=Digits(), **QUICK).status == "repaired"
    assert finder in trainer.callbacks  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_neither_a_callback_nor_a_trace_in_the_model(
    tmp_path: Path, trained: Classifier, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    class Broken(Instance):
        def allowed(self, counts: FlipCounts) -> int:
            raise error

    monkeypatch.setattr("signal.signal", lambda *args: None)  # Lightning would ignore Ctrl-C from here on
    trainer, old = quiet_trainer(tmp_path), {name: value.clone() for name, value in trained.state_dict().items()}
    before = settings(trainer)
    with pytest.raises((error, SystemExit)):
        repair(trainer, trained, datamodule=Digits(), gate=Broken(), **QUICK)
    assert settings(trainer) == before
    assert all(torch.equal(value, old[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("minimum", [{"min_epochs": 1}, {"min_steps": 1}])
def test_a_trainer_that_must_train_is_refused(tmp_path: Path, trained: Classifier, minimum: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="`trainer` has `min_epochs` or `min_steps`"):
        repair(quiet_trainer(tmp_path, **minimum), trained, datamodule=Digits())


def test_a_trainer_with_a_repair_of_its_own_is_refused(tmp_path: Path, trained: Classifier) -> None:
    with pytest.raises(ConfigurationError, match="`trainer` has a RegressionFreeRepair of its own"):
        repair(quiet_trainer(tmp_path, quick_repair()), trained, datamodule=Digits())


def test_arguments_go_to_the_callback_or_stand_alone(tmp_path: Path, trained: Classifier) -> None:
    with pytest.raises(ConfigurationError, match=r"`callback` was given, and \['seed'\] too"):
        repair(quiet_trainer(tmp_path), trained, datamodule=Digits(), callback=quick_repair(), seed=1)


def test_bad_input_is_refused_as_in_a_fit(tmp_path: Path, trained: Classifier) -> None:
    trainer = quiet_trainer(tmp_path)
    before = settings(trainer)
    with pytest.raises(ConfigurationError, match=r"`layer='network\.9'` is not in the model"):
        repair(trainer, trained, datamodule=Digits(), layer="network.9")
    assert settings(trainer) == before


def test_the_best_checkpoint_is_asked_for_by_its_path(tmp_path: Path, trained: Classifier) -> None:
    with pytest.raises(ConfigurationError, match=r"`start_from='best'`[\s\S]*HINT: [\s\S]*`ckpt_path`"):
        repair(quiet_trainer(tmp_path), trained, datamodule=Digits(), data=DataOptions(start_from="best"))


class Scheduled(Classifier):
    """Asks the trainer how long training is."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)]


def test_a_schedule_may_ask_for_the_length_of_training(tmp_path: Path, trained: Classifier) -> None:
    model = Scheduled()
    model.load_state_dict(trained.state_dict())
    report = repair(quiet_trainer(tmp_path, max_epochs=None), model, datamodule=Digits(), **QUICK)
    assert report.status == "repaired"


def test_a_checkpoint_may_have_more_epochs_than_the_trainer(tmp_path: Path, trained_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    assert repair(trainer, Classifier(), datamodule=Digits(), ckpt_path=trained_path, **QUICK).status == "repaired"
    assert trainer.max_epochs == 1


def test_nothing_is_said_about_training(tmp_path: Path, trained_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=None, logger=CSVLogger(tmp_path))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        repair(trainer, Classifier(), datamodule=Digits(), ckpt_path=trained_path, **QUICK)
    texts = [str(w.message) for w in said]
    assert not [text for text in texts if "max_epochs" in text or "training batches" in text or "HINT" in text]


@pytest.mark.parametrize("skip", [{"max_epochs": 0}, {"limit_train_batches": 0}, {"limit_val_batches": 0}])
def test_a_trainer_that_would_not_train_repairs_all_the_same(
    tmp_path: Path, trained: Classifier, skip: dict[str, int]
) -> None:
    data = Digits()
    report = repair(quiet_trainer(tmp_path, **skip), trained, data.train_dataloader(), data.val_dataloader(), **QUICK)
    assert [split.n for split in report.splits] == [400, 100]


def test_a_rerun_of_a_repair_has_a_folder_of_its_own(tmp_path: Path, trained_path: Path) -> None:
    first = repaired(tmp_path, Classifier(), datamodule=Digits(), ckpt_path=trained_path)
    second = repaired(tmp_path, Classifier(), datamodule=Digits(), ckpt_path=first.files["checkpoint"])
    assert second.hashes.model_before == first.hashes.model_after
    assert Path(second.files["json"]).parent == tmp_path / "repair-1"
