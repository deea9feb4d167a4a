from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nrl.report import Hashes, LocalizationReport, RepairReport, SearchReport, SplitReport, WeightChange

TRAIN = SplitReport("train", "known", 1172, 0, 9, 17, 0, 0, (), (1, 5, 7, 8, 9, 33, 44, 55, 66), ())
VAL = SplitReport("val", "known", 288, 0, 14, 16, 30, 14, tuple(range(30)), tuple(range(14)), ())
TEST = SplitReport("test", "unseen", 270, 1, 12, 14, 22, 11, tuple(range(22)), tuple(range(12)), (17,))


@pytest.fixture
def repaired() -> RepairReport:
    return RepairReport(
        status="repaired",
        reason="14 of 30 targeted failures pass now. Of 1,460 known samples that passed before, none broke.",
        layers=("classifier",),
        target="confusion 3 -> 5",
        gate="instance",
        task="Multiclass",
        splits=(TRAIN, VAL, TEST),
        localization=LocalizationReport(
            32, 210, {"failed": 80, "passed": 90, "both": 49, "localized": 31, "total": 640}
        ),
        search=SearchReport(62, "no better fitness for 20 iterations", 0.25, 1.5, {"best": [0.25, 1.5]}, 30, 1460),
        change=WeightChange(31, 640, 0.123, 0.0123, 0.04),
        hashes=Hashes("a" * 64, "b" * 64, "c" * 64, "d" * 64),
        seed=7,
        seconds={"collect": 0.3, "search": 3.21},
        versions={"python": "3.12.0", "torch": "2.9.0"},
        files={"checkpoint": "logs/version_0/repair/repaired.ckpt", "json": "logs/version_0/repair/report.json"},
        settings={"n_passed": None, "method": {"particles": 100}},
    )


@pytest.fixture
def refused(repaired: RepairReport) -> RepairReport:
    return replace(
        repaired,
        status="refused",
        reason="Of 1,460 known samples that passed before, 3 would break (3 in val); the gate allows none.",
        splits=(
            SplitReport("train", "known", 1172, 0, 0, 26, 0, 0),
            SplitReport("val", "known", 288, 0, 0, 30, 30, 0, tuple(range(30))),
            SplitReport("test", "unseen", 271, 0, 0, 26, 22, 0, tuple(range(22))),
        ),
        candidate=(TRAIN, replace(VAL, kept=285, broken=3, broken_ids=(7, 99, 130))),
        hashes=Hashes("a" * 64, "a" * 64),
        files={},
    )


@pytest.fixture
def nothing(refused: RepairReport) -> RepairReport:
    return replace(
        refused,
        status="nothing to repair",
        reason="no failed sample of val is in the target",
        candidate=(),
        localization=None,
        search=None,
        change=None,
    )
