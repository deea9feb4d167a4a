"""What a fit says of calibration data."""

from __future__ import annotations

from pathlib import Path

from digit_models import Classifier, Digits, quick_repair, quiet_trainer

from lightning_nrl import RepairReport
from lightning_nrl.report.stats import upper_limit


def test_a_fit_says_at_most_how_many_others_break(tmp_path: Path) -> None:
    repair = quick_repair(calibration="test")
    quiet_trainer(tmp_path, repair, enable_checkpointing=False).fit(Classifier(), datamodule=Digits())
    report = repair.report
    assert report.status == "repaired"
    split, bounds = report.splits[-1], report.bounds
    assert (split.role, bounds.broken, bounds.n) == ("calibration", split.broken, split.passed)
    assert bounds.upper >= upper_limit(split.broken, split.passed) - 1e-12
    written = RepairReport.from_json(Path(report.files["json"]).read_text())
    assert written.bounds == bounds
    assert f"broken {bounds.broken} of {bounds.n}" in Path(report.files["markdown"]).read_text()
