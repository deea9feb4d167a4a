"""What a repair leaves in checkpoints, its own and those of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    OVERWRITING,
    QUICK,
    Classifier,
    Digits,
    Untrainable,
    overwriting,
    quick_repair,
    quiet_trainer,
    right,
    same,
    since_2_6,
)
from lightning_package import ModelCheckpoint, TensorBoardLogger, Trainer, pl
from packaging.version import Version
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_nrl
from lightning_nrl import ConfigurationError, RepairReport
from lightning_nrl.pipeline import PATCH_NAME


def fit(
    path: Path, *callbacks: Any, network: str = "mlp", **arguments: Any
) -> tuple[Trainer, Classifier]:
    trainer, model = quiet_trainer(path, *callbacks, **arguments), Classifier(network)
    trainer.fit(model, datamodule=Digits())
    return trainer, model


def saved(path: str | Path, weights_only: bool = True) -> dict[str, Any]:
    return torch.load(path, weights_only=weights_only)


def assert_holds(path: str | Path, model: Classifier, weights_only: bool = True) -> None:
    """The checkpoint has, bit for bit, the weights of the model."""
    assert same(saved(path, weights_only)["state_dict"], model)


def test_the_repaired_checkpoint_is_an_ordinary_one(tmp_path):
    repair = quick_repair(unseen="test")
    trainer, model = fit(tmp_path, repair)
    assert repair.repaired_model_path == str(tmp_path / "repair" / "repaired.ckpt")
    assert_holds(repair.repaired_model_path, model)
    checkpoint = saved(repair.repaired_model_path)
    assert checkpoint["global_step"] == trainer.global_step == 36
    assert checkpoint["optimizer_states"][0]["state"][0]["step"] == 36
    assert checkpoint["hyper_parameters"] == {"network": "mlp", "lr": 3e-3}
    # A test of it gives the counts of the report, which comes back with it.
    (unseen,) = (split for split in repair.report.splits if split.role == "unseen")
    tester = quiet_trainer(tmp_path, loaded := quick_repair())
    (result,) = tester.test(
        Classifier(), ckpt_path=repair.repaired_model_path, datamodule=Digits(), verbose=False
    )
    assert result["test_right"] == unseen.kept + unseen.repaired
    if Version(pl.__version__) >= Version("2.6"):
        assert loaded.report == repair.report
        assert (
            RepairReport.from_json(Path(repair.report.files["json"]).read_text()) == repair.report
        )


def test_resuming_a_complete_training_keeps_the_repaired_weights(tmp_path):
    repair, again, model = quick_repair(), quick_repair(), Classifier()
    _, repaired = fit(tmp_path, repair, max_epochs=1)
    with pytest.warns(UserWarning, match="no repair was made, because no training step ran"):
        quiet_trainer(tmp_path, again, max_epochs=1).fit(
            model, datamodule=Digits(), ckpt_path=repair.repaired_model_path
        )
    assert same(model, repaired)
    assert again.report == repair.report


def test_the_best_checkpoint_is_not_touched_and_the_last_one_holds_the_repair(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    last = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=5)
    _, model = fit(tmp_path, best, last, repair := quick_repair())
    assert repair.report.status == "repaired"
    weight = f"{repair.report.layers[0]}.weight"
    assert not torch.equal(
        saved(best.best_model_path)["state_dict"][weight], model.state_dict()[weight]
    )
    if Version(pl.__version__) >= Version("2.6"):
        assert_holds(tmp_path / "last.ckpt", model)


@pytest.mark.parametrize("before", OVERWRITING)
def test_what_averages_or_prunes_may_stand_before_the_repair(tmp_path, before):
    repair = quick_repair()
    trainer, model = fit(tmp_path, overwriting(before), repair, network="cnn", max_epochs=2)
    assert repair.report.status == "repaired"
    known = {split.split: split for split in repair.report.splits}
    assert (
        int(right(model, Digits().repair).sum()) == known["repair"].kept + known["repair"].repaired
    )
    # The state of torch 2.6's own schedule for averaged weights holds a function.
    plain = before != "StochasticWeightAveraging" or Version(torch.__version__) >= Version("2.7")
    assert_holds(repair.repaired_model_path, model, plain)
    trainer.save_checkpoint(tmp_path / "later.ckpt", weights_only=False)
    assert_holds(tmp_path / "later.ckpt", model, plain)
    # The callback is there when the checkpoint is loaded, and must not put weights of before in
    # their place.
    how = {"weights_only": plain} if Version(pl.__version__) >= Version("2.6") else {}
    (result,) = trainer.test(
        model, Digits(), ckpt_path=repair.repaired_model_path, verbose=False, **how
    )
    assert_holds(repair.repaired_model_path, model, plain)
    assert result["test_right"] == int(right(model, Digits().test).sum())


@since_2_6
def test_the_averaged_weights_of_a_checkpoint_are_repaired_not_the_live_ones(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer, _ = fit(tmp_path, keep, overwriting("WeightAveraging"))
    averaged, model = saved(keep.best_model_path), Classifier()
    how = {**QUICK, "layer": "network.3"}
    report = lightning_nrl.repair(
        trainer, model, datamodule=Digits(), ckpt_path=keep.best_model_path, **how
    )
    assert report.status == "repaired"
    assert not torch.equal(
        averaged["current_model_state"]["network.1.bias"], averaged["state_dict"]["network.1.bias"]
    )
    assert torch.equal(model.network[1].bias, averaged["state_dict"]["network.1.bias"])
    trainer.test(model, Digits(), ckpt_path=report.files["checkpoint"], verbose=False)
    assert_holds(report.files["checkpoint"], model)


def test_repairs_may_start_from_the_best_checkpoint(tmp_path):
    keep = ModelCheckpoint(
        tmp_path, monitor="val_loss", mode="max"
    )  # the best is the worst: the first epoch
    first, second = (
        quick_repair(layer="network.3", start_from="best"),
        quick_repair(layer="network.1"),
    )
    _, model = fit(tmp_path, keep, first, second)
    assert "epoch=0" in keep.best_model_path
    best = Classifier.load_from_checkpoint(keep.best_model_path)
    assert first.report.status == "repaired"
    assert second.report.hashes.model_before == first.report.hashes.model_after
    data = Digits()
    assert not any(
        (right(best, part) & ~right(model, part)).any() for part in (data.train, data.repair)
    )
    assert_holds(second.repaired_model_path or first.repaired_model_path, model)


def test_two_repairs_of_two_layers_come_one_after_the_other(tmp_path):
    first, second = quick_repair(layer="network.3"), quick_repair(layer="network.1")
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer, model = fit(tmp_path, first, second, logger=logger)
    for name, repair in (("repair", first), ("repair-1", second)):
        events = EventAccumulator(str(tmp_path / name)).Reload()
        repaired = sum(split.repaired_in_target for split in repair.report.splits)
        (point,) = events.Scalars("repair/known_repaired_in_target")
        assert point.value == repaired
        assert trainer.callback_metrics[f"{name}/known_repaired_in_target"] == repaired
    assert first.state_key != second.state_key
    assert first.report.files["json"] == str(tmp_path / "repair" / "report.json")
    assert second.report.files["json"] == str(tmp_path / "repair-1" / "report.json")
    assert second.report.hashes.model_before == first.report.hashes.model_after
    assert_holds(second.repaired_model_path, model)
    states = saved(second.repaired_model_path)["callbacks"]
    assert [RepairReport.from_json(states[r.state_key]["report"]) for r in (first, second)] == [
        first.report,
        second.report,
    ]


def test_a_second_fit_with_the_same_callback_repairs_anew_and_leaves_its_checkpoints_alone(
    tmp_path,
):
    repair = quick_repair()
    _, first = fit(tmp_path / "a", repair, max_epochs=1)
    report, path = repair.report, repair.repaired_model_path
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    _, second = fit(tmp_path / "b", keep, repair, max_epochs=1, limit_train_batches=2)
    assert repair.report.hashes.model_before != report.hashes.model_before
    assert_holds(path, first)
    assert_holds(repair.repaired_model_path, second)
    steps = [
        saved(tmp_path / f"step={step}.ckpt")["state_dict"]["network.3.weight"] for step in (1, 2)
    ]
    assert not torch.equal(*steps)


@pytest.mark.figures
def test_files_go_where_they_are_wanted(tmp_path):
    folder = tmp_path / "here"
    fit(tmp_path, quick_repair(dirpath=folder), max_epochs=1)
    assert {file.name for file in folder.iterdir()} == {
        "flipped_samples",
        "repaired.ckpt",
        PATCH_NAME,
        "report.json",
        "report.md",
        "report.html",
    }
    assert (folder / "report.html").read_text().count("<svg") > 3


def test_apricot_takes_the_checkpoints_of_the_trainer(tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_top_k=3)
    repair = quick_repair(method="apricot")
    fit(tmp_path, kept, repair)
    assert repair.report.settings["method"]["checkpoints"] == sorted(kept.best_k_models)
    assert "checkpoints, right on" in repair.report.steps[0].note
    with pytest.raises(ConfigurationError, match=r"`Apricot.checkpoints`: the fit saves none\."):
        quiet_trainer(tmp_path, quick_repair(method="apricot"), enable_checkpointing=False).fit(
            Untrainable(), datamodule=Digits()
        )
