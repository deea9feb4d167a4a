"""A repair protects the samples of a suite, and adds what it repaired."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from digit_models import QUICK, Classifier, Digits, quick_repair, quiet_trainer

from lightning_nrl import (
    ConfigurationError,
    RegressionSuite,
    ReleaseGate,
    RepairReport,
    SampleOptions,
    repair,
)
from lightning_nrl.entrypoints.command_line import main
from lightning_nrl.errors import DataWarning
from lightning_nrl.updates import Predictions


def test_what_a_repair_repairs_is_protected_from_then_on(trained_path, tmp_path):
    trained = Classifier.load_from_checkpoint(trained_path)
    suite = tmp_path / "suite.csv"
    arguments = {"datamodule": Digits(), "suite": suite, **QUICK}
    report = repair(quiet_trainer(tmp_path / "a"), trained, target="label 3", **arguments)
    assert report.status == "repaired"
    samples = RegressionSuite.read(suite).samples
    repaired = {
        (split.split, flip.id)
        for split in report.splits
        for flip in split.flipped_as("repaired")
        if flip.id in split.targeted_ids
    }
    assert samples.keys() == repaired
    assert len(samples) == report.known_counts.repaired_in_target > 0
    assert {entry.label for entry in samples.values()} == {3}
    assert {entry.reason.partition(" by ")[2] for entry in samples.values()} == {"`label 3`"}
    by_hand = tmp_path / "by_hand.csv"
    from_report = ["--report", report.files["json"], "--reason", "incident 7"]
    assert main(["suite", "add", str(by_hand), *from_report]) == 0
    added = RegressionSuite.read(by_hand).samples
    assert added.keys() == samples.keys()
    assert {entry.reason for entry in added.values()} == {"incident 7"}
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
    assert [row.split for row in gate.report.rows] == ["test", "repair"]
    suite.write_text("split,id\nnight,3\n")
    gate = ReleaseGate(trained_path, suite=suite, verbose=False)
    with pytest.raises(ConfigurationError, match=r"names the split 'night', .*\nHINT: read all"):
        quiet_trainer(tmp_path / "d", gate).test(trained, datamodule=Digits(), verbose=False)


def test_a_suite_and_protected_samples_are_one_too_many(trained, tmp_path):
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


def repaired(trained: Classifier, folder: Path, suite: Path) -> RepairReport:
    """Repairs a copy of the model, which is left as it is."""
    return repair(
        quiet_trainer(folder),
        copy.deepcopy(trained),
        datamodule=Digits(),
        suite=suite,
        **QUICK,
    )


HEADER = "split,id,label,since,reason,key\n"


def test_samples_that_a_repair_cannot_protect_are_named(trained, tmp_path):
    suite = tmp_path / "suite.csv"
    suite.write_text("split,id\ntest,3\nrepair,1\n")
    with pytest.warns(DataWarning, match=r"its samples of 'test' are not known data"):
        repaired(trained, tmp_path, suite)


@pytest.fixture(scope="module")
def entries(trained_path, tmp_path_factory) -> dict[str, object]:
    """What a suite says of sample 3 of the repair data: its label, another one, and its key."""
    data, folder = Digits(), tmp_path_factory.mktemp("predictions")
    gate = ReleaseGate(trained_path, loaders={"repair": data.repair_dataloader()}, verbose=False)
    trained = Classifier.load_from_checkpoint(trained_path)
    quiet_trainer(folder, gate).test(trained, datamodule=data, verbose=False)
    keys = Predictions.read(gate.report.files["predictions"]).keys
    label = int(data.repair.tensors[1][3])
    return {"label": label, "other": (label + 1) % 10, "key": keys["repair", 3]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tset,3,,,,", r"suite: split='tset'` is unknown\.\nHINT: did you mean 'test'"),
        ("repair,203,,,,", "no sample 203"),
        ("repair,3,{other},,,", r"`suite`: 1 samples of `repair` have another label .* \(3\)"),
        ("repair,3,{label},,,{key}1", r"`suite`: 1 samples of `repair` have another label or key"),
        ("repair,4,,,,{key}", r"`suite`: 1 samples of `repair` have another label or key"),
    ],
)
def test_another_sample_in_its_place_is_an_error_in_a_repair_too(
    line, message, entries, trained, tmp_path
):
    suite = tmp_path / "suite.csv"
    suite.write_text(HEADER + line.format(**entries) + "\n")
    with pytest.raises(ConfigurationError, match=message):
        repaired(trained, tmp_path, suite)


def test_the_label_and_the_key_of_a_sample_are_those_of_a_gate(entries, trained, tmp_path):
    suite = tmp_path / "suite.csv"
    suite.write_text(HEADER + "repair,3,{label},,,{key}\n".format(**entries))
    assert repaired(trained, tmp_path, suite).status == "repaired"


def test_an_unknown_split_is_found_before_training(tmp_path):
    suite = tmp_path / "suite.csv"
    suite.write_text("split,id\ntset,3\n")
    model = Classifier()
    trainer = quiet_trainer(tmp_path, quick_repair(suite=suite))
    with pytest.raises(ConfigurationError, match="is unknown"):
        trainer.fit(model, datamodule=Digits())
    assert trainer.global_step == 0


def test_a_second_repair_protects_what_was_added_since(trained, tmp_path):
    callback = quick_repair(suite=tmp_path / "suite.csv", target="label 3")
    for n_repairs in range(2):
        report = repair(
            quiet_trainer(tmp_path),
            copy.deepcopy(trained),
            datamodule=Digits(),
            callback=callback,
        )
        assert report.status == "repaired"
        protected = report.settings["protected"]
        assert (protected is None) == (n_repairs == 0)
    added = {("repair", at) for at in protected["repair"]}
    assert added == RegressionSuite.read(tmp_path / "suite.csv").samples.keys()


def test_a_gate_checks_what_an_earlier_test_added(trained, trained_path, tmp_path):
    """The model in use gets it wrong, the first model right, the second wrong again."""
    suite = tmp_path / "suite.csv"
    old = Classifier.load_from_checkpoint(trained_path)
    data = Digits()
    right = {}
    for name, model in (("old", old), ("new", trained)):
        if name == "new":
            quiet_trainer(tmp_path, max_epochs=12).fit(model, datamodule=data)
        images, labels, _ = data.test.tensors
        right[name] = model.eval()(images).argmax(1) == labels
    at = int((right["old"] & right["new"]).nonzero()[0])
    suite.write_text(f"split,id\ntest,{at}\n")
    gate = ReleaseGate(trained_path, rules="tolerance:90%", suite=suite, verbose=False)
    trainer = quiet_trainer(tmp_path, gate)
    trainer.test(trained, datamodule=data, verbose=False)
    assert gate.report.status == "accepted"
    trainer.test(old, datamodule=data, verbose=False)
    assert gate.report.status == "refused"
    (finding,) = [found for found in gate.report.findings if not found.passed]
    assert len(finding.ids["test"]) == int((right["new"] & ~right["old"]).sum())
