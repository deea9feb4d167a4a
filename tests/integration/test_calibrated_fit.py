"""What a fit says of calibration data, slice by slice."""

from __future__ import annotations

from pathlib import Path

from digit_models import Classifier, Digits, quick_repair, quiet_trainer

from lightning_nrl import RepairReport
from lightning_nrl.stats import upper_limit


def test_a_fit_says_at_most_how_many_others_break(tmp_path: Path) -> None:
    # `noisy`, the third column: rare in validation data, common in the repair data.
    repair = quick_repair(calibration="test", slices=lambda batch: ["noisy" if x else "clean" for x in batch[2]])
    quiet_trainer(tmp_path, repair, enable_checkpointing=False).fit(Classifier(), datamodule=Digits())
    report = repair.report
    assert report.status == "repaired"
    split, bounds = report.splits[-1], report.bounds
    assert (split.role, bounds.broken, bounds.n) == ("calibration", split.broken, split.passed)
    assert bounds.upper >= upper_limit(split.broken, split.passed) - 1e-12
    assert [part.name for part in bounds.slices] == ["clean", "noisy"]
    assert sum(part.n for part in bounds.slices) == split.passed
    written = RepairReport.from_json(Path(report.files["json"]).read_text())
    assert written.bounds == bounds
    assert f"broken {bounds.broken} of {bounds.n}" in Path(report.files["markdown"]).read_text()
