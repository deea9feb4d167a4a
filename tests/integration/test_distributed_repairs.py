"""Two processes repair by each task, and with arguments that tell samples apart, as one process
does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import QUICK, Classifier, Digits, camera, quiet_trainer, same, state_of
from options import with_options
from task_models import CASES
from torch import Tensor
from two_processes import in_two_processes

from lightning_nrl import ParticleSwarm, RepairReport, SearchOptions, Target, repair
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.published import MergedRepairs, bundle

SWARM = ParticleSwarm(particles=12, iterations=8)
METHODS = {
    "multilabel": SWARM,
    "segmentation": "finetune-polish",
}
"""A method for each task."""


def worth(batch: Any) -> Tensor:
    """What each failure of `Digits` counts."""
    return 1 + 2 * batch[1]


def look(batch: Any) -> list[str]:
    """The group of each sample of `Digits`: images of a digit, noisy or not."""
    return [f"{label} {noisy}" for label, noisy in zip(*batch[1:], strict=True)]


USED_OPTIONS = {
    "columns": {
        "method": "convex",
        "importance": worth,
        "slices": camera,
        "quotas": {"noisy": 5, "clean": "25%"},
        "protected": Target.label(0),
        "set_aside": "doubtful",
        "gate": "tolerance:3",
        "calibration": "val",
        "limit": "tolerance:1",
        "confidence": 0.9,
    },
    "merged": {
        "method": MergedRepairs(
            "label", most=2, method=bundle("arachne", searcher=SWARM), searcher=SWARM
        ),
        "risk": {(3, 5): 4, 8: 2},
    },
    "groups": {"method": "convex", "groups": look},
    "quota": {"slices": Target.label(8), "quotas": {"label 8": 1000}},
}
"""Arguments of a repair of `Digits` that tell its samples apart."""


DRAWN = "segmentation"
EXACT = ("multilabel", *USED_OPTIONS)
"""Repairs that draw no mini-batches, which two processes would draw otherwise."""

Made = dict[str, tuple[dict[str, Tensor], RepairReport]]


def make_all(folder: Path, checkpoints: dict[str, Path], devices: int) -> Made:
    """Weights and report of each repair, by one process or by a rank of two."""
    search = SearchOptions(localizer=NeuRecoverLite(n_weights=24))
    strategy = "ddp" if devices > 1 else "auto"
    made = {}
    for name, checkpoint in checkpoints.items():
        if name in METHODS:
            data, model = CASES[name].make()
            settings = {"task": CASES[name].task, "method": METHODS[name], "search": search}
        else:
            data, model = Digits(), Classifier()
            settings = with_options({**QUICK, **USED_OPTIONS[name]})
        report = repair(
            quiet_trainer(folder, devices=devices, strategy=strategy),
            model,
            datamodule=data,
            ckpt_path=checkpoint,
            **{"unseen": "test", "dirpath": folder / name, **settings, "verbose": False},
        )
        made[name] = (state_of(model), report)
    return made


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory,
    trained_path: Path,
    trained_task: Callable[[str], Path],
) -> tuple[Made, list[Made]]:
    """What one process makes, and each of two."""
    folder = tmp_path_factory.mktemp("repairs")
    checkpoints = dict.fromkeys(USED_OPTIONS, trained_path)
    checkpoints |= {name: trained_task(name) for name in METHODS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two
    try:
        alone = make_all(folder / "alone", checkpoints, 1)
    finally:
        torch.set_num_threads(threads)
    return alone, in_two_processes(make_all, folder / "together", checkpoints, 2)


def told(report: RepairReport) -> list[Any]:
    """All that does not depend on time, on places of files and on the last bits of weights, as
    margins do.
    """
    steps = [replace(step, seconds=0.0) for step in report.steps]
    splits = [
        (split.split, split.counts, split.repaired_ids, split.broken_ids, split.targeted_ids)
        for split in report.splits
    ]
    return [
        splits,
        steps,
        report.status,
        report.reason,
        report.slices,
        report.set_aside,
        report.chosen_strength,
        report.bounds,
        report.localization,
        report.unseen_groups,
    ]


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_repair_what_one_repairs(found, name):
    (alone, one), ranks = found[0][name], found[1]
    for state, report in (rank[name] for rank in ranks):
        assert told(report) == told(one)
        torch.testing.assert_close(state, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*EXACT, DRAWN])
def test_both_processes_have_the_same_weights_and_the_same_report(found, name):
    (first, one), (second, two) = (rank[name] for rank in found[1])
    assert same(first, second)
    assert told(one) == told(two)
    assert one.hashes == two.hashes


def test_other_mini_batches_make_another_repair_that_breaks_nothing(found):
    (_, alone), (state, report) = found[0][DRAWN], found[1][0][DRAWN]
    assert (alone.status, report.status) == ("repaired", "repaired")
    data, model = CASES[DRAWN].make()
    model.load_state_dict(state)
    for one, two in zip(alone.splits, report.splits, strict=True):
        assert (one.n, one.passed, one.targeted_ids) == (two.n, two.passed, two.targeted_ids)
        assert not two.broken or two.role == "unseen"
        passed = CASES[DRAWN].counted(model, getattr(data, two.split))
        assert two.kept + two.repaired == int(passed.sum())


def test_what_was_asked_for_had_an_effect(found):
    """Else equal reports would say little."""
    reports = {name: report for name, (_, report) in found[1][0].items()}
    assert {name: report.status for name, report in reports.items()} == {
        **dict.fromkeys(reports, "repaired"),
        "quota": "not repaired",
    }
    columns = reports["columns"]
    assert {row.name for row in columns.slices} == {"clean", "noisy"}
    assert columns.set_aside
    assert all(split.counts.groups for split in reports["groups"].splits)
    assert reports["groups"].unseen_groups is not None
    assert "which has" in reports["quota"].reason
