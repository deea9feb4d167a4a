"""A repair that does not come about leaves the weights as training left them, and says why."""

from __future__ import annotations

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

from lightning_nrl import ParticleSwarm, Target, repair


def test_without_failed_samples_in_the_target_there_is_nothing_to_repair(tmp_path):
    callback = quick_repair(target=Target.where(nobody, name="purple digits"))
    model, remember = Classifier(), Remember()
    quiet_trainer(tmp_path, remember, callback, max_epochs=1).fit(model, datamodule=Digits())
    report = callback.report
    assert report.status == "nothing to repair"
    assert report.reason.startswith(
        "no sample of repair, right or wrong, is in the target (where purple digits)"
    )
    assert all(split.targeted == split.broken == split.repaired == 0 for split in report.splits)
    assert same(model, remember.state)
    assert callback.repaired_model_path is None
    assert not (tmp_path / "repair" / "repaired.ckpt").exists()
    assert (tmp_path / "repair" / "report.json").exists()


def test_a_refused_repair_names_the_samples_that_it_would_break(tmp_path, trained):
    data, settings = (
        Digits(),
        {"fitness": "eq2", "n_passed": 1, "method": ParticleSwarm(20, 40, start="half")},
    )
    before = {split: right(trained, getattr(data, split)) for split in ("train", "repair")}
    refused, accepted = (
        repair(quiet_trainer(tmp_path), trained, datamodule=data, callback=quick_repair(**given))
        for given in (settings, {**settings, "gate": "tolerance:100%"})
    )
    assert (refused.status, accepted.status) == ("refused", "repaired")
    for split in refused.candidate:
        broken = before[split.split] & ~right(trained, getattr(data, split.split))
        assert list(split.broken_ids) == broken.nonzero().flatten().tolist()
    assert sum(len(split.broken_ids) for split in refused.candidate) > 0
    assert all(split.broken == 0 for split in refused.splits)


def test_where_training_is_skipped_a_warning_says_so(tmp_path):
    callback = quick_repair()
    with pytest.warns(UserWarning, match=r"no repair was made, because no training step ran"):
        quiet_trainer(tmp_path, callback, max_epochs=0).fit(Classifier(), datamodule=Digits())
    assert callback.report is None
