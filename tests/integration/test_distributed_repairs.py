"""Two processes repair by each task, and with arguments that tell samples apart, as one process does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_repairs import HEEDED, jobs, make_all
from task_models import CASES
from two_processes import in_two_processes

from lightning_nrl import RepairReport

EXACT = ("multilabel", "regression", "custom", *HEEDED)
"""Repairs that draw no mini-batches, which two processes would draw otherwise."""
TRAINED = ("segmentation", "sequence")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, trained_path: Path, trained_tasks: dict[str, Path]) -> Path:
    """A folder with what one process does in `alone`, and in `together` what two do."""
    folder = tmp_path_factory.mktemp("repairs")
    for name, path in trained_tasks.items():
        shutil.copy(path, folder / f"{name}.ckpt")
    for name in HEEDED:
        shutil.copy(trained_path, folder / f"{name}.ckpt")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two
    try:
        for _, job in jobs():
            job(folder / "alone", 1)
    finally:
        torch.set_num_threads(threads)
    in_two_processes(make_all, folder / "together")
    return folder


def left(folder: Path, rank: int = 0) -> tuple[dict[str, torch.Tensor], RepairReport]:
    """The weights and the report that a rank has."""
    found = torch.load(folder / f"rank{rank}.pt", weights_only=True)
    return found["state"], RepairReport.from_json(found["report"])


def told(report: RepairReport) -> dict[str, Any]:
    """All that does not depend on time, on places of files and on the last bits of weights, as margins do."""
    names = ("status", "reason", "candidate", "slices", "set_aside", "strength", "chosen_strength", "bounds")
    steps = [replace(step, seconds=0.0) for step in report.steps]
    splits = [
        replace(split, flipped=[replace(s, margin_before=0.0, margin_after=0.0) for s in split.flipped])
        for split in report.splits
    ]
    found = {name: getattr(report, name) for name in (*names, "localization")}
    return {**found, "splits": splits, "steps": steps}


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_repair_what_one_repairs(folder: Path, name: str) -> None:
    alone, one = left(folder / "alone" / name)
    for rank in (0, 1):
        state, report = left(folder / "together" / name, rank)
        assert told(report) == told(one)
        for key, value in alone.items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*EXACT, *TRAINED])
def test_both_processes_have_the_same_weights_and_the_same_report(folder: Path, name: str) -> None:
    (first, one), (second, two) = (left(folder / "together" / name, rank) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert told(one) == told(two)
    assert one.hashes == two.hashes


@pytest.mark.parametrize("name", TRAINED)
def test_of_other_mini_batches_comes_another_repair_that_breaks_nothing(folder: Path, name: str) -> None:
    _, alone = left(folder / "alone" / name)
    state, report = left(folder / "together" / name)
    assert (alone.status, report.status) == ("repaired", "repaired")
    data, model = CASES[name].make()
    model.load_state_dict(state)
    for one, two in zip(alone.splits, report.splits, strict=True):
        assert (one.split, one.n, one.passed, one.targeted_ids) == (two.split, two.n, two.passed, two.targeted_ids)
        assert not two.broken or two.role == "unseen"
        assert two.kept + two.repaired == int(CASES[name].counted(model, getattr(data, two.split)).sum())


def test_what_was_asked_for_had_an_effect(folder: Path) -> None:
    """Else equal reports would say little."""
    reports = {name: left(folder / "together" / name)[1] for name in (*CASES, *HEEDED)}
    assert {name: report.status for name, report in reports.items()} == {
        **dict.fromkeys(reports, "repaired"),
        "quota": "not repaired",
    }
    columns, ids = reports["columns"], reports["ids"]
    assert {one.name for one in columns.slices} == {"clean", "noisy"}
    assert columns.set_aside
    assert columns.bounds is not None
    assert ids.set_aside
    assert ids.bounds is not None
    assert "which has" in reports["quota"].reason
