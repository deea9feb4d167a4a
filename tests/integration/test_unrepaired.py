"""A repair that does not come about leaves the weights as training left them, and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from digit_models import (
    Classifier,
    Digits,
    Remember,
    nobody,
    quick_repair,
    quiet_trainer,
    right,
    same,
)

from lightning_nrl import ParticleSwarm, RegressionFreeRepair, Target


def fit(path: Path, repair: RegressionFreeRepair) -> None:
    model, remember = Classifier(), Remember()
    trainer = quiet_trainer(path, remember, repair, max_epochs=1)
    trainer.fit(model, datamodule=Digits())
    (result,) = trainer.test(
        model, ckpt_path=repair.repaired_model_path, datamodule=Digits(), verbose=False
    )
    assert result["test_right"] == int(right(model, Digits().test).sum())
    assert same(model, remember.state)
    assert repair.repaired_model_path is None
    assert not (path / "repair" / "repaired.ckpt").exists()
    assert (path / "repair" / "report.json").exists()


def test_without_failed_samples_in_the_target_there_is_nothing_to_repair(tmp_path: Path) -> None:
    repair = quick_repair(target=Target.where(nobody, name="purple digits"))
    fit(tmp_path, repair)
    assert repair.report.status == "nothing to repair"
    assert repair.report.reason.startswith(
        "no sample of repair, right or wrong, is in the target (where purple digits)"
    )
    assert all(
        split.targeted == split.broken == split.repaired == 0 for split in repair.report.splits
    )


def test_a_search_without_a_step_repairs_nothing(tmp_path: Path) -> None:
    repair = quick_repair(method=ParticleSwarm(particles=2, iterations=0, start="paper"))
    fit(tmp_path, repair)
    assert repair.report.status == "not repaired"


def test_a_refused_repair_names_the_samples_that_it_would_break(
    tmp_path: Path, trained: Classifier
) -> None:
    data, settings = (
        Digits(),
        {"fitness": "eq2", "n_passed": 1, "method": ParticleSwarm(20, 40, start="half")},
    )
    before = {split: right(trained, getattr(data, split)) for split in ("train", "repair")}
    refused, accepted = quick_repair(**settings), quick_repair(**settings, gate="tolerance:100%")
    trained.hparams["lr"] = 0.0
    for name, repair in (("a", refused), ("b", accepted)):
        quiet_trainer(tmp_path / name, repair, max_epochs=1).fit(trained, datamodule=Digits())
    assert refused.report.status == "refused"
    assert accepted.report.status == "repaired"
    for split in refused.report.candidate:
        broken = before[split.split] & ~right(trained, getattr(data, split.split))
        assert list(split.broken_ids) == broken.nonzero().flatten().tolist()
    assert sum(len(split.broken_ids) for split in refused.report.candidate) > 0
    assert all(split.broken == 0 for split in refused.report.splits)


@pytest.mark.parametrize("arguments", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_where_training_is_skipped_a_warning_says_so(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    repair = quick_repair()
    with pytest.warns(UserWarning, match=r"no repair was made, because no training step ran"):
        quiet_trainer(tmp_path, repair, **arguments).fit(Classifier(), datamodule=Digits())
    assert repair.report is None
