"""`diagnose(trainer, model, ...)` on a trained model, which stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed_diagnosis
import pytest
import torch
from digit_models import Classifier, Digits, Untrainable, quick_repair, quiet_trainer, right
from lightning_package import CSVLogger, ModelCheckpoint
from two_processes import in_two_processes

from lightning_nrl import ConfigurationError, Target, diagnose
from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.analysis.diagnosis import Diagnosis


def noisy(batch: Any) -> Any:
    return batch[2]


def test_a_checkpoint_is_diagnosed_without_a_trace(tmp_path: Path, trained_path: Path) -> None:
    data, model, trainer = Digits(), Untrainable(), quiet_trainer(tmp_path, logger=True)
    random = torch.get_rng_state()
    found = diagnose(trainer, model, datamodule=data, ckpt_path=trained_path, target=Target.where(noisy, name="noisy"))
    trained = torch.load(trained_path, weights_only=True)["state_dict"]
    assert hash_tensors(model.state_dict()) == hash_tensors(trained)
    assert (trainer.max_epochs, trainer.should_stop) == (3, False)
    assert torch.equal(torch.get_rng_state(), random)
    assert not list(tmp_path.iterdir())
    # The failures are those of a forward pass of our own.
    wrong = ~right(model, data.repair)
    targets = (wrong & data.repair.tensors[2]).nonzero().flatten().tolist()
    assert [(t.split, t.id) for t in found.targets] == [("repair", i) for i in targets]
    assert found.known["failed"] == int(wrong.sum()) + int((~right(model, data.train)).sum())
    assert found.head == "network.3"
    assert [layer.layer for layer in found.layers] == ["network.1", "network.3"]
    # Three epochs: what the checkpoint was trained for.
    (constrained,) = (cost for cost in found.costs if cost.method == "finetune-polish")
    assert constrained.how == "3 more epochs of training, then a polish"


def test_processes_that_end_with_the_fit_are_refused(tmp_path: Path, trained: Classifier) -> None:
    trainer = quiet_trainer(tmp_path, strategy="ddp_spawn", devices=2)
    with pytest.raises(ConfigurationError, match=r"DDPStrategy starts processes of its own[\s\S]*HINT: use one device"):
        diagnose(trainer, trained, datamodule=Digits())


def test_the_best_checkpoint_of_the_trainer_can_be_diagnosed(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    trainer = quiet_trainer(tmp_path, best, logger=CSVLogger(tmp_path))
    trainer.fit(model := Classifier(), datamodule=Digits())
    before, loggers, files = dict(vars(best)), trainer.loggers, sorted(tmp_path.rglob("*"))
    diagnose(trainer, model, datamodule=Digits(), ckpt_path="best")
    assert hash_tensors(model.state_dict()) == hash_tensors(torch.load(best.best_model_path)["state_dict"])
    assert (vars(best), trainer.loggers, sorted(tmp_path.rglob("*"))) == (before, loggers, files)


def test_a_trainer_that_saves_by_its_logger_does_so_after_a_diagnosis(tmp_path: Path, trained: Classifier) -> None:
    trainer = quiet_trainer(tmp_path, logger=CSVLogger(tmp_path), max_epochs=1)
    diagnose(trainer, trained, datamodule=Digits())
    assert not list(tmp_path.iterdir())
    trainer.fit(trained, datamodule=Digits())
    assert list((tmp_path / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt"))


def test_what_is_known_to_pass_is_what_the_model_gets_right(tmp_path: Path, trained: Classifier) -> None:
    data = Digits()
    found = diagnose(quiet_trainer(tmp_path), trained, datamodule=data)
    passes = {"train": right(trained, data.train), "repair": right(trained, data.repair)}
    assert found.known["passed"] == sum(int(x.sum()) for x in passes.values())
    assert found.binding
    assert all(passes[b.split][b.id] for b in found.binding)
    assert not any(passes[t.split][t.id] for t in found.targets)
    assert {t.fixable for t in found.targets} <= {"yes", "no"}


def test_data_loaders_will_do_and_one_target_can_be_asked_for(tmp_path: Path, trained: Classifier) -> None:
    data = Digits()
    loaders = data.train_dataloader(), data.repair_dataloader()
    found = diagnose(quiet_trainer(tmp_path), trained, *loaders, target=Target.label(8))
    assert {t.label for t in found.targets} == {8}
    assert found.target == "label 8"
    nothing = diagnose(quiet_trainer(tmp_path), trained, *loaders, target=Target.where(lambda batch: batch[1] < 0))
    assert nothing.advice.startswith("Nothing to repair")


def test_what_cannot_be_diagnosed_is_said_before_anything_runs(tmp_path: Path, trained: Classifier) -> None:
    with pytest.raises(ConfigurationError, match="`trainer` has a RegressionFreeRepair of its own"):
        diagnose(quiet_trainer(tmp_path, quick_repair()), trained, datamodule=Digits())
    with pytest.raises(ConfigurationError, match="`target=8` is no Target"):
        diagnose(quiet_trainer(tmp_path), trained, datamodule=Digits(), target=8)


def test_two_processes_find_what_one_finds(tmp_path: Path, trained_path: Path) -> None:
    in_two_processes(distributed_diagnosis.on_rank, tmp_path, trained_path)
    first, second = (Diagnosis.from_json((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    one = diagnose(quiet_trainer(tmp_path), Classifier(), datamodule=Digits(), ckpt_path=trained_path)
    assert (first.advice, first.costs) == (second.advice, second.costs)
    assert first.targets[0].split == "repair"
    for other in (one, second):
        assert (first.known, first.doubts, first.mixing) == (other.known, other.doubts, other.mixing)
        assert [(t.id, t.fixable) for t in first.targets] == [(t.id, t.fixable) for t in other.targets]
        assert [(b.split, b.id, b.targets) for b in first.binding] == [
            (b.split, b.id, b.targets) for b in other.binding
        ]
        assert [layer.change for layer in first.layers] == pytest.approx([x.change for x in other.layers], rel=1e-3)
