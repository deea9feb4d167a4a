from __future__ import annotations

import pytest

from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.records import (
    LocalizationReport,
    PricePoint,
    Rung,
    SearchReport,
    SplitReport,
    WeightChange,
)
from lightning_nrl.report import RepairReport

ASKED = {
    "layers": ("classifier",),
    "target": "label 3",
    "gate": "instance",
    "task": "Multiclass",
}
HISTORY = {
    "best": [4.25, 6.5, 7.5],
    "mean": [-2.0, float("nan"), 3.0],
    "patched": [4.0, 6.0, 7.0],
    "intact": [90.0, 90.0, 90.0],
    "loss_failed": [2.5, 1.0, 0.5],
    "loss_passed": [0.25, 0.25, 0.25],
    "diversity": [1.0, 0.5, 0.25],
}


@pytest.fixture
def accepted() -> RepairReport:
    """Ten failures, seven of them repaired; nothing known broken, one unseen sample broken."""
    return RepairReport(
        status="repaired",
        reason="7 of 10 targeted failures now pass, "
        "and none of 90 known samples that passed broke.",
        splits=(
            SplitReport(
                "train", "known", TargetCounts(80, 0, 2, 8, targeted=0, repaired_in_target=0)
            ),
            SplitReport(
                "val", "known", TargetCounts(10, 0, 7, 3, targeted=10, repaired_in_target=7)
            ),
            SplitReport(
                "test", "unseen", TargetCounts(15, 1, 3, 1, targeted=4, repaired_in_target=3)
            ),
        ),
        localization=LocalizationReport(requested=8, n_g=20, sizes={"localized": 8, "total": 640}),
        search=SearchReport(
            2, "all 2 iterations were made", 7.5, 4.25, HISTORY, n_failed=10, n_passed=90
        ),
        change=WeightChange(changed=8, total=640, l2=1.5, relative=0.25, largest=0.75),
        seed=3,
        seconds={"collect": 0.5, "search": 1.5},
        rungs=(
            Rung(
                "search",
                7,
                9,
                0,
                8,
                1.5,
                held_out=TargetCounts(20, 1, 2, 3, 4, 2),
                kept=True,
                note="8 weights",
            ),
            Rung("exact", 5, 5, 0, 640, 0.25),
        ),
        choice="of held-out samples ...: `search` is kept.",
        price=(PricePoint(0.0, 0, 7, 9), PricePoint(1.0, 12, 9, 11)),
        settings={"n_passed": None, "fitness": {"kind": "eq2", "alpha": 6.0}, "layer": "auto"},
        **ASKED,
    )


@pytest.fixture
def refused() -> RepairReport:
    """Weights that would have broken two known samples."""
    return RepairReport(
        status="refused",
        reason="2 of 90 known samples that passed would break, and the gate allows none.",
        splits=(
            SplitReport(
                "val", "known", TargetCounts(90, 0, 0, 10, targeted=10, repaired_in_target=0)
            ),
        ),
        candidate=(
            SplitReport(
                "val", "known", TargetCounts(88, 2, 9, 1, targeted=10, repaired_in_target=9)
            ),
        ),
        seed=3,
        **ASKED,
    )
