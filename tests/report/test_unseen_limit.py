from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.report import RepairReport, SplitReport, UpdateSplit
from lightning_nrl.report.unseen_limit import unseen_limit, unseen_text

KNOWN = SplitReport("val", "known", TargetCounts(90, 0, 5, 5))
UNSEEN = SplitReport("test", "unseen", TargetCounts(904, 4, 60, 32))
REPORT = RepairReport("repaired", "", (), "", "", "", (KNOWN, UNSEEN))


def test_the_limit_is_that_of_clopper_and_pearson() -> None:
    assert unseen_limit(REPORT) == pytest.approx(0.0100524, abs=1e-7)  # scipy.stats.beta.ppf(0.95, 5, 904)
    assert unseen_text(REPORT) == (
        "broken 4 of 908 that were right; with 95 % confidence at most 1.01 % of samples like these"
    )
    assert "Unseen data: broken 4 of 908 that were right; with" in REPORT.to_markdown().split("\n\n")[2]


def test_there_is_none_without_unseen_data_or_a_change() -> None:
    for report in (replace(REPORT, splits=(KNOWN,)), replace(REPORT, status="refused")):
        assert unseen_limit(report) is None
        assert unseen_text(report) == ""
        assert "samples like these" not in report.to_markdown()


def test_of_an_update_it_is_of_what_the_replaced_model_got_right() -> None:
    against = UpdateSplit(UNSEEN, replace(UNSEEN, counts=TargetCounts(98, 2, 0, 0)))
    assert unseen_text(replace(REPORT, update=(against,))).startswith("broken 2 of 100")


def test_samples_that_are_known_too_make_it_too_good() -> None:
    assert unseen_text(replace(REPORT, leaked={"test": 12})).endswith("(too good a limit: 12 of them are known too)")
