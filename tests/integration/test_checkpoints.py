"""What a repair leaves in checkpoints, its own and those of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import OVERWRITING, Classifier, Digits, overwriting, quick_repair, quiet_trainer, right, since_2_6
from lightning_package import ModelCheckpoint, Trainer
from packaging.version import Version
from torch import Tensor

from lightning_nrl import RepairReport, Target
from lightning_nrl.pipeline import PATCH_NAME


def fit(path: Path, *callbacks: Any, network: str = "mlp", **arguments: Any) -> tuple[Trainer, Classifier]:
    trainer, model = quiet_trainer(path, *callbacks, **arguments), Classifier(network)
    trainer.fit(model, datamodule=Digits())
    return trainer, model


def saved(path: str | Path, weights_only: bool = True) -> dict[str, Any]:
    return torch.load(path, weights_only=weights_only)


def assert_holds(path: str | Path, model: Classifier, weights_only: bool = True) -> None:
    """The checkpoint has, bit for bit, the weights of the model."""
    state = saved(path, weights_only)["state_dict"]
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_the_repaired_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    repair = quick_repair()
    trainer, model = fit(tmp_path, repair)
    assert repair.repaired_model_path == str(tmp_path / "repair" / "repaired.ckpt")
    assert_holds(repair.repaired_model_path, model)
    checkpoint = saved(repair.repaired_model_path)
    assert checkpoint["global_step"] == trainer.global_step == 36
    assert checkpoint["optimizer_states"][0]["state"][0]["step"] == 36
    assert checkpoint["hyper_parameters"] == {"network": "mlp", "lr": 3e-3}
    loaded = Classifier.load_from_checkpoint(repair.repaired_model_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_test_of_the_repaired_checkpoint_gives_the_counts_of_the_report(tmp_path: Path) -> None:
    repair = quick_repair(unseen="test")
    fit(tmp_path, repair)
    (unseen,) = (split for split in repair.report.splits if split.role == "unseen")
    (result,) = quiet_trainer(tmp_path, quick_repair()).test(
        Classifier(), ckpt_path=repair.repaired_model_path, datamodule=Digits(), verbose=False
    )
    assert result["test_right"] == unseen.kept + unseen.repaired
    assert unseen.n == 300


@since_2_6
def test_the_report_comes_back_with_the_repaired_checkpoint(tmp_path: Path) -> None:
    repair, other = quick_repair(), quick_repair()
    fit(tmp_path, repair)
    quiet_trainer(tmp_path, other).test(
        Classifier(), ckpt_path=repair.repaired_model_path, datamodule=Digits(), verbose=False
    )
    assert other.report == repair.report
    assert other.report == RepairReport.from_json((tmp_path / "repair" / "report.json").read_text())


def test_training_goes_on_from_the_repaired_checkpoint_and_is_repaired_again(tmp_path: Path) -> None:
    first, second = quick_repair(), quick_repair()
    fit(tmp_path, first, max_epochs=1)
    resumed, model = quiet_trainer(tmp_path, second, max_epochs=2), Classifier()
    resumed.fit(model, datamodule=Digits(), ckpt_path=first.repaired_model_path)
    assert resumed.global_step == 24
    assert second.report.hashes.model_before != first.report.hashes.model_after
    assert second.repaired_model_path == str(tmp_path / "repair-1" / "repaired.ckpt")
    assert_holds(second.repaired_model_path, model)


def test_resuming_a_complete_training_keeps_the_repaired_weights(tmp_path: Path) -> None:
    repair, again, model = quick_repair(), quick_repair(), Classifier()
    _, repaired = fit(tmp_path, repair, max_epochs=1)
    with pytest.warns(UserWarning, match="no repair was made, because no training step ran"):
        quiet_trainer(tmp_path, again, max_epochs=1).fit(
            model, datamodule=Digits(), ckpt_path=repair.repaired_model_path
        )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), repaired.parameters(), strict=True))
    assert again.report == repair.report


@since_2_6
def test_a_last_checkpoint_that_is_saved_after_the_repair_holds_it(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=5)
    repair = quick_repair()
    _, model = fit(tmp_path, keep, repair)
    assert repair.report.status == "repaired"
    assert_holds(tmp_path / "last.ckpt", model)


def test_the_best_checkpoint_is_not_touched(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    repair = quick_repair()
    _, model = fit(tmp_path, keep, repair)
    weight = f"{repair.report.layers[0]}.weight"
    assert not torch.equal(saved(keep.best_model_path)["state_dict"][weight], model.state_dict()[weight])


@pytest.mark.parametrize("before", OVERWRITING)
def test_what_averages_or_prunes_may_stand_before_the_repair(tmp_path: Path, before: str) -> None:
    repair = quick_repair()
    trainer, model = fit(tmp_path, overwriting(before), repair, network="cnn", max_epochs=2)
    assert repair.report.status == "repaired"
    known = {split.split: split for split in repair.report.splits}
    assert int(right(model, Digits().repair).sum()) == known["repair"].kept + known["repair"].repaired
    # The state of torch 2.6's own schedule for averaged weights holds a function.
    plain = before != "StochasticWeightAveraging" or Version(torch.__version__) >= Version("2.7")
    assert_holds(repair.repaired_model_path, model, plain)
    trainer.save_checkpoint(tmp_path / "later.ckpt", weights_only=False)
    assert_holds(tmp_path / "later.ckpt", model, plain)


def test_a_repair_may_start_from_the_best_checkpoint(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")  # the best is the worst: the first epoch
    repair = quick_repair(start_from="best")
    _, model = fit(tmp_path, keep, repair)
    assert "epoch=0" in keep.best_model_path
    best = Classifier.load_from_checkpoint(keep.best_model_path)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, best.state_dict()[name])]
    assert changed == ["network.3.weight"]
    passed = right(best, Digits().repair)
    assert not (passed & ~right(model, Digits().repair)).any()
    assert_holds(repair.repaired_model_path, model)


def test_a_repair_goes_on_from_what_another_made_of_the_best_checkpoint(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")  # the best is the worst: the first epoch
    first, second = quick_repair(layer="network.3", start_from="best"), quick_repair(layer="network.1")
    _, model = fit(tmp_path, keep, first, second)
    assert "epoch=0" in keep.best_model_path
    assert second.report.hashes.model_before == first.report.hashes.model_after
    assert first.report.status == "repaired"
    bias = saved(keep.best_model_path)["state_dict"]["network.3.bias"]
    assert torch.equal(model.state_dict()["network.3.bias"], bias)


def test_without_a_best_checkpoint_the_last_weights_are_repaired(tmp_path: Path) -> None:
    repair = quick_repair(start_from="best")
    with pytest.warns(UserWarning, match="`start_from='best'`: no best checkpoint was saved"):
        fit(tmp_path, repair, enable_checkpointing=False)
    assert repair.report.status == "repaired"


def test_two_repairs_of_two_layers_come_one_after_the_other(tmp_path: Path) -> None:
    first, second = quick_repair(layer="network.3"), quick_repair(layer="network.1")
    _, model = fit(tmp_path, first, second)
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


def test_two_targets_in_one_layer_are_repaired_one_after_the_other(tmp_path: Path) -> None:
    first, second = quick_repair(target=Target.label(1)), quick_repair(target=Target.label(8))
    fit(tmp_path, first, second)
    assert [split.broken for split in second.report.splits] == [0, 0]
    passing = first.report.splits[1].kept + first.report.splits[1].repaired
    assert second.report.splits[1].passed == passing
    assert first.report.splits[1].repaired_in_target > 0


def test_a_second_fit_with_the_same_callback_repairs_anew(tmp_path: Path) -> None:
    repair = quick_repair()
    _, first = fit(tmp_path / "a", repair, max_epochs=1)
    report, path = repair.report, repair.repaired_model_path
    _, second = fit(tmp_path / "b", repair, max_epochs=2)
    assert repair.report.hashes.model_before != report.hashes.model_before
    assert_holds(path, first)
    assert_holds(repair.repaired_model_path, second)


def test_a_checkpoint_of_a_later_training_is_not_rewritten(tmp_path: Path) -> None:
    repair = quick_repair()
    _, model = fit(tmp_path / "a", repair, max_epochs=1)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    quiet_trainer(tmp_path / "b", keep, repair, max_epochs=1, limit_train_batches=2).fit(model, datamodule=Digits())
    steps = [saved(tmp_path / f"step={step}.ckpt")["state_dict"]["network.3.weight"] for step in (1, 2)]
    assert not torch.equal(*steps)


@pytest.mark.figures
@pytest.mark.parametrize("dirpath", ["here", None])
def test_files_go_where_they_are_wanted(tmp_path: Path, dirpath: str | None) -> None:
    folder = tmp_path / (dirpath or "repair")
    repair = quick_repair(dirpath=dirpath and folder)
    fit(tmp_path, repair, max_epochs=1)
    assert {file.name for file in folder.iterdir()} == {
        "flipped_samples",
        "repaired.ckpt",
        PATCH_NAME,
        "report.json",
        "report.md",
        "report.html",
    }
    assert (folder / "report.html").read_text().count("<svg") > 3


def weights_of(model: Classifier) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_same_seed_gives_the_same_repair(tmp_path: Path) -> None:
    models = [fit(tmp_path / name, quick_repair(seed=seed))[1] for name, seed in (("a", 7), ("b", 7), ("c", 8))]
    a, b, c = map(weights_of, models)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
