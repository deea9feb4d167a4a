"""The files of a repair: whole or not at all, of one run, and of the weights that were judged."""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Untrainable,
    quick_repair,
    quiet_trainer,
    same,
    state_of,
)
from lightning_package import TensorBoardLogger, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_processes import server

from lightning_nrl import RegressionFreeRepair, RepairReport
from lightning_nrl._trainer.output import announcement
from lightning_nrl._utils import atomic_files as whole_files
from lightning_nrl.errors import ConfigurationError, FilesWarning, RepairWarning
from lightning_nrl.pipeline import Outcome, Patch
from lightning_nrl.records import hash_tensors

NAMES = {"repaired.ckpt", "repair.patch.safetensors", "report.json", "report.md", "report.html"}
MARKED = "<!doctype html><dt>lightning_nrl</dt>"  # a page, drawn in no time
REPORTS = {"report.json", "report.md", "report.html"}


@dataclass
class Repaired:
    """A repair that was accepted and is not saved yet, and where it is to go."""

    callback: RegressionFreeRepair
    trainer: Trainer
    model: Classifier
    outcome: Outcome
    folder: Path

    def save(self, outcome: Outcome | None = None, folder: Path | None = None) -> RepairReport:
        """Saves and announces it; puts the weights into the model."""
        callback = self.callback
        callback.dirpath, callback.verbose = folder or self.folder, True
        outcome = self.outcome if outcome is None else outcome
        name = callback.save_outcome(self.trainer, self.model, outcome)
        callback.announce(self.trainer, outcome, name)
        return callback.report

    @property
    def is_in_the_model(self) -> bool:
        return hash_tensors(self.model.state_dict()) == self.outcome.report.hashes.model_after


class Unsaved(RegressionFreeRepair):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.outcome = self.attempt(trainer, pl_module)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Repaired:
    callback, model = quick_repair(), Classifier()
    callback.__class__ = Unsaved
    trainer = quiet_trainer(tmp_path_factory.mktemp("fit"), callback, enable_checkpointing=False)
    trainer.fit(model, datamodule=Digits())
    return Repaired(callback, trainer, model, callback.outcome, Path())


@pytest.fixture
def found(fitted: Repaired, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repaired]:
    """The model is as it was before the repair, for each test; pages are drawn elsewhere."""
    monkeypatch.setattr(RepairReport, "to_html", lambda report, *_: MARKED)
    state = state_of(fitted.model)
    yield replace(fitted, folder=tmp_path / "mine")
    fitted.model.load_state_dict(state)


def names_in(folder: Path) -> set[str]:
    """Files in a folder; pictures have one of their own."""
    return {path.name for path in folder.iterdir()} - {"flipped_samples"}


def test_a_run_without_a_repair_does_not_pass_an_earlier_model_off_as_its_own(found):
    assert found.save().status == "repaired"
    assert names_in(found.folder) == NAMES
    assert (found.folder / "flipped_samples").is_dir()
    assert same(found.folder / "repaired.ckpt", found.model)
    nothing = Outcome(replace(found.outcome.report, status="nothing to repair"))
    assert set(found.save(nothing).files) == {"json", "markdown", "html"}
    # The only copy of the model is not lost.
    assert names_in(found.folder) == {
        *REPORTS,
        "earlier-repaired.ckpt",
        "earlier-repair.patch.safetensors",
    }
    assert not (found.folder / "flipped_samples").exists()
    assert same(found.folder / "earlier-repaired.ckpt", found.model)


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No file whose name ends so can be written."""
    make_durable = whole_files._make_durable

    def full(path: Path) -> None:
        if path.name.endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        make_durable(path)

    monkeypatch.setattr(whole_files, "_make_durable", full)


@pytest.mark.parametrize("missing", ["repaired.ckpt", "report.json", ""])
def test_a_full_disk_costs_a_message(found, monkeypatch, missing):
    full_disk(monkeypatch, missing)
    message = r"the repair was accepted and is in the model, but .* lacks .*No space left on device"
    with pytest.warns(FilesWarning, match=message):
        report = found.save()
    assert found.is_in_the_model
    assert report.status == "repaired"
    assert names_in(found.folder) == (NAMES - {missing} if missing else set())
    assert {Path(path).name for path in report.files.values()} == names_in(found.folder)


def fails(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: BaseException) -> None:
    monkeypatch.setattr(owner, name, Mock(side_effect=error))


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        (Patch, "save", "lacks `repair.patch.safetensors` (ZeroDivisionError: on purpose)"),
        (announcement, "track", "the report was not shown (ZeroDivisionError: on purpose)"),
    ],
)
def test_a_late_exception_costs_a_message(found, monkeypatch, owner, name, message):
    fails(monkeypatch, owner, name, ZeroDivisionError("on purpose"))
    with pytest.warns(RepairWarning, match=re.escape(message)):
        report = found.save()
    assert found.is_in_the_model
    assert same(found.folder / "repaired.ckpt", found.model)
    assert names_in(found.folder) == {Path(path).name for path in report.files.values()}


@pytest.mark.parametrize(
    ("owner", "name"),
    [(announcement, "show"), (RepairReport, "to_html")],
)
def test_an_interrupt_and_the_files_agree(found, monkeypatch, owner, name):
    fails(monkeypatch, owner, name, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        found.save()
    saved = name != "to_html"  # which is called while files are written
    assert found.is_in_the_model == saved
    assert names_in(found.folder) == (NAMES if saved else set())
    assert not saved or same(found.folder / "repaired.ckpt", found.model)


def without_a_layer(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.endswith("3.weight")}


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    return {f"old.{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "extra", "message"),
    [
        (without_a_layer, None, "it would not hold the repaired 'network.3.weight'"),
        (renamed, None, ""),
        (dict, Path("an object"), ""),
        (dict, lambda: None, "lacks `repaired.ckpt` ("),
    ],
)
def test_a_checkpoint_that_is_not_what_was_judged_is_not_kept(
    found, monkeypatch, recwarn, change, extra, message
):
    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = change(checkpoint["state_dict"])
        checkpoint["extra"] = extra

    monkeypatch.setattr(found.model, "on_save_checkpoint", on_save_checkpoint)
    report = found.save()
    assert found.is_in_the_model
    said = [str(w.message) for w in recwarn if isinstance(w.message, FilesWarning)]
    assert [message in text for text in said] == ([True] if message else [])
    assert ("checkpoint" in report.files) == (not message)
    assert names_in(found.folder) == (NAMES if not message else NAMES - {"repaired.ckpt"})


@pytest.mark.parametrize("name", [*sorted(NAMES), "flipped_samples"])
def test_a_file_of_the_user_is_refused_before_the_work_and_never_removed(found, name):
    notes = found.folder / name
    if name == "flipped_samples":
        notes /= "notes.md"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine, with lightning_nrl")
    callback = quick_repair(dirpath=found.folder)
    with pytest.raises(ConfigurationError, match=f"`dirpath`: .*{name} is no file of this package"):
        quiet_trainer(found.folder, callback, max_epochs=1).fit(Untrainable(), datamodule=Digits())
    # A file may come while the repair runs. Files of the package are replaced.
    kept = found.folder / f"earlier-{name}"
    for _ in range(2):
        assert found.save().status == "repaired"
        assert (kept / "notes.md" if kept.is_dir() else kept).read_text().startswith("mine")


def test_a_mark_is_there_only_beside_whole_files(tmp_path):
    """Every moment at which a process may be killed, and what the folder holds then."""
    names, states = ["a", "b", "mark"], []

    def run(text: str, written: list[str], steps: int) -> None:
        """Puts files there, and is killed after so many steps."""
        left = [steps]

        def step(call: Any) -> Any:
            def counted(*args: Any) -> Any:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return call(*args)

            return counted

        with (
            pytest.MonkeyPatch.context() as patch,
            whole_files.StagedFiles(tmp_path, names, ["mark"]) as files,
        ):
            for name in written:
                files.write(name, lambda path: path.write_text(text))
            patch.setattr(whole_files, "_move", step(whole_files._move))
            patch.setattr(whole_files, "_remove", step(whole_files._remove))
            files.commit()

    run("one", names, 99)
    for steps in range(5):
        run("one", names, 99)
        with suppress(KeyboardInterrupt):
            run("two", ["a", "mark"], steps)
        there = {path.name: path.read_text() for path in tmp_path.iterdir()}
        states.append(there)
        if "mark" in there:
            assert {there[name] for name in names if name in there} == {there["mark"]}
        (tmp_path / "earlier-b").unlink(missing_ok=True)
    assert states[0] == {"a": "one", "b": "one", "mark": "one"}
    assert states[-1] == {"a": "two", "mark": "two", "earlier-b": "one"}


def save_for_ever(folder: Path, connection: Connection, draws: bool) -> None:
    """Saves and logs one repair after another, each of its own weights and with its number in all
    of its files.
    """
    torch.set_num_threads(1)
    if not draws:  # which takes most of the time
        RepairReport.to_html = lambda report, *_: f"{MARKED}{report.reason}"
    callback, model = quick_repair(dirpath=folder), Classifier()
    callback.__class__ = Unsaved
    logger = TensorBoardLogger(folder.parent, "log", "run")
    trainer = quiet_trainer(folder.parent, callback, enable_checkpointing=False, logger=logger)
    trainer.fit(model, datamodule=Digits())
    state, outcome = state_of(model), callback.outcome
    for number in range(1_000_000):
        model.load_state_dict(state)
        new = {name: value + number * 1e-6 for name, value in outcome.parameters.items()}
        hashes = replace(outcome.report.hashes, model_after=hash_tensors({**state, **new}))
        report = replace(outcome.report, reason=f"Run {number}.", hashes=hashes)
        one = replace(outcome, report=report, parameters=new)
        callback.announce(trainer, one, callback.save_outcome(trainer, model, one))
        connection.send("saved")


def killed_while_it_saves(folder: Path, seconds: float, draws: bool) -> None:
    """Kills a process so many seconds after it has saved a repair, when it saves others over it."""
    context = server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=save_for_ever, args=(folder, sender, draws))
    process.start()
    sender.close()  # so that the pipe ends with the process
    try:
        assert receiver.recv() == "saved"
        time.sleep(seconds)
    finally:
        process.kill()
        process.join()


def assert_whole(folder: Path) -> bool:
    """Files can be read, and are of one run where there is a report; whether there is one."""
    there = {name for name in names_in(folder) if not name.startswith(".unfinished-")}
    assert there <= NAMES
    assert "repaired.ckpt" in there
    checkpoint = torch.load(folder / "repaired.ckpt", weights_only=True)
    (callback,) = checkpoint["callbacks"].values()
    own = RepairReport.from_json(callback["report"])
    assert hash_tensors(checkpoint["state_dict"]) == own.hashes.model_after
    if "repair.patch.safetensors" in there:
        Patch.load(folder / "repair.patch.safetensors")
    # No page of one run lies beside the checkpoint of another.
    for page in ("report.md", "report.html"):
        if page in there:
            assert own.reason in (folder / page).read_text()
    if "report.json" not in there:
        return False
    assert there == NAMES
    report = RepairReport.from_json((folder / "report.json").read_text())
    assert (report.reason, report.hashes) == (own.reason, own.hashes)
    patched = Patch.load(folder / "repair.patch.safetensors").report
    assert patched.reason == report.reason
    for log in folder.parent.rglob("events.out.tfevents.*"):
        EventAccumulator(str(log)).Reload()
    return True


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_half_written(tmp_path):
    """NRL_KILLS is how many processes are killed, each at a random moment."""
    dice, whole = random.Random(0), 0
    kills = int(os.environ.get("NRL_KILLS", "1"))
    for number in range(kills):
        folder = tmp_path / str(number) / "mine"
        draws = number % 2 == 1
        killed_while_it_saves(folder, dice.uniform(0, 4.0 if draws else 0.4), draws)
        whole += assert_whole(folder)
    print(f"{kills} killed, {whole} of them left a report")
