"""The log folders that a browser looks at: a real repair, and a report that is as large and as
hostile as they come.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from live_tensorboard import SCREENSHOTS
from repository import ROOT

from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.records import SplitReport
from lightning_nrl.records.splits import ConfusionCell, FlippedSample
from lightning_nrl.report import RepairReport

HOSTILE = "<img src=x onerror=window.hacked=1><b>cat"
HOSTILE_NAME = "hostile/repair"
N_FLIPS = 10_000


def small_log(folders: pytest.TempPathFactory) -> Path:
    """The log folder of a small repair, made once for all processes; where pictures are wanted, of
    the quickstart.
    """
    base = folders.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    logs, script = base / "lightning_logs", ROOT / "tests" / "browser" / "small_repair.py"
    with FileLock(base / "browsed.lock"):
        if not logs.exists():
            command = [
                sys.executable,
                str(script if SCREENSHOTS is None else ROOT / "examples" / "quickstart.py"),
            ]
            environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
            done = subprocess.run(
                command, cwd=base, env=environment, capture_output=True, text=True, timeout=400
            )
            assert done.returncode == 0, done.stderr
    # A copy, as tests write to it.
    return Path(shutil.copytree(logs, folders.mktemp("browsed") / "lightning_logs"))


def write_hostile(log_dir: Path) -> None:
    """A report of ten thousand flipped samples, with markup wherever a user's words go."""
    flipped = []
    for i in range(N_FLIPS):
        name = "night" if i % 100 == 7 else HOSTILE
        repaired = FlippedSample(i, "repaired", i % 2 == 0, 0, 1, 0, -0.5, i / 9, name)
        flipped.append(
            repaired if i % 4 else FlippedSample(i, "broken", True, 0, 0, 1, i / 7, -1.5, name)
        )
    counts = TargetCounts(90_000, 2_500, 7_500, 0, 3_750, 3_750)
    split = SplitReport(
        HOSTILE, "unseen", counts, (), tuple(flipped), (ConfusionCell(0, 1, 7_500, 2_500),)
    )
    words = ("repaired", HOSTILE, (HOSTILE,), HOSTILE, HOSTILE, HOSTILE)
    report = RepairReport(
        *words, (split,), settings={HOSTILE: HOSTILE}, class_names=(HOSTILE, "dog")
    )
    folder = log_dir / HOSTILE_NAME
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report.to_json())


def write_copy(log_dir: Path, name: str) -> None:
    """The report of a repair once more, as if it had kept the worst of the samples that the repair
    breaks.

    Every class is taken for another one more often, so that the matrix of confusions is as wide as
    it gets.
    """
    report = RepairReport.from_json((log_dir / name / "report.json").read_text())
    (unseen,) = [split for split in report.splits if split.role == "unseen"]
    broken = [one for one in unseen.flipped if one.flip == "broken"]
    worst = min(broken, key=lambda one: one.margin_after)
    counts = replace(unseen.counts, broken=len(broken) - 1, kept=unseen.kept + 1)
    kept = replace(
        unseen, counts=counts, flipped=tuple(one for one in unseen.flipped if one is not worst)
    )
    kept = replace(kept, confusion=tuple(ConfusionCell(i, (i + 1) % 10, 0, 1) for i in range(10)))
    splits = tuple(kept if split is unseen else split for split in report.splits)
    (log_dir / "copy").mkdir()
    (log_dir / "copy" / "report.json").write_text(replace(report, splits=splits).to_json())
