"""A repair protects the samples of a suite, and adds what it repaired."""

from __future__ import annotations

from pathlib import Path

import pytest
from digit_models import Classifier, Digits, quiet_trainer

from lightning_nrl import ConfigurationError, ReleaseGate, SampleOptions, repair
from lightning_nrl.errors import DataWarning
from lightning_nrl.methods import Convex
from lightning_nrl.updates import RegressionSuite


def test_what_a_repair_repairs_is_protected_from_then_on(
    trained_path: Path, tmp_path: Path
) -> None:
    trained = Classifier.load_from_checkpoint(trained_path)
    suite = tmp_path / "suite.csv"
    arguments = {"datamodule": Digits(), "method": Convex(), "verbose": False, "suite": suite}
    report = repair(quiet_trainer(tmp_path / "a"), trained, target="label 3", **arguments)
    assert report.status == "repaired"
    samples = RegressionSuite.read(suite).samples
    repaired = {
        (split.split, flip.id)
        for split in report.splits
        for flip in split.flipped
        if flip.flip == "repaired" and flip.label == 3
    }
    assert samples.keys() == repaired != set()
    assert {entry.label for entry in samples.values()} == {3}
    assert {entry.reason.partition(" by ")[2] for entry in samples.values()} == {"`label 3`"}
    # A gate that lets everything break still keeps them.
    loose = repair(quiet_trainer(tmp_path / "b"), trained, gate="tolerance:90%", **arguments)
    broken = {(split.split, at) for split in loose.splits for at in split.broken_ids}
    assert loose.status == "repaired"
    assert not broken & repaired
    # The model of before the repair gets them wrong.
    gate = ReleaseGate(trained_path, require="any", suite=suite, verbose=False)
    trainer = quiet_trainer(tmp_path / "c", gate)
    # It reads the splits of the suite, too, for this rule alone.
    trainer.test(Classifier.load_from_checkpoint(trained_path), datamodule=Digits(), verbose=False)
    assert gate.report.status == "refused"
    assert "by `label 3`" in gate.report.to_markdown()
    assert {finding.rule for finding in gate.report.findings if not finding.passed} == {
        f"protected:{suite}"
    }
    assert gate.report.findings[0].rule == "instance in test"
    trainer.test(trained, datamodule=Digits(), verbose=False)
    assert [row.split for row in gate.report.rows] == ["test", "repair", "train"]
    suite.write_text("split,id\nnight,3\n")
    gate = ReleaseGate(trained_path, suite=suite, verbose=False)
    with pytest.raises(ConfigurationError, match=r"names the split 'night', .*\nHINT: read all"):
        quiet_trainer(tmp_path / "d", gate).test(trained, datamodule=Digits(), verbose=False)


def test_a_suite_and_protected_samples_are_one_too_many(
    trained: Classifier, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.csv"
    suite.write_text("split,id\nval,3\n")
    with pytest.raises(ConfigurationError, match="both protect samples"):
        repair(
            quiet_trainer(tmp_path),
            trained,
            datamodule=Digits(),
            suite=suite,
            samples=SampleOptions(protected={"val": [3]}),
        )


def test_samples_that_a_repair_cannot_protect_are_named(
    trained: Classifier, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.csv"
    suite.write_text("split,id\ntest,3\nrepair,1\n")
    with pytest.warns(DataWarning, match=r"its samples of 'test' are not known data"):
        repair(
            quiet_trainer(tmp_path),
            trained,
            datamodule=Digits(),
            method=Convex(),
            suite=suite,
            verbose=False,
        )
