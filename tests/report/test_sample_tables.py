from __future__ import annotations

import math
from dataclasses import replace

from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.report import Page, RepairReport, SplitReport, UpdateSplit
from lightning_nrl.report.page import Heading, Row
from lightning_nrl.report.sample_records import ClassCounts, ConfusionCell, FlippedSample
from lightning_nrl.report.sample_tables import (
    class_table,
    confusion_changes,
    most_telling,
    sample_blocks,
    sample_table,
)

BROKEN = FlippedSample(4, "broken", False, 1, 1, 0, 0.5, -0.25, "night")
WORSE = FlippedSample(5, "broken", False, 0, 0, 2, 0.5, -2.0)
REPAIRED = FlippedSample(2, "repaired", True, 2, 0, 2, -1.0, 0.5)
MORE = FlippedSample(3, "repaired", True, 2, 0, 2, -1.0, 3.0)
NAMES = ("cat", "dog", "owl")


def test_the_worst_broken_samples_come_first_then_the_largest_gains() -> None:
    assert most_telling([REPAIRED, BROKEN, MORE, WORSE]) == [WORSE, BROKEN, MORE, REPAIRED]
    without_margins = [replace(one, margin_before=math.nan, margin_after=math.nan) for one in (REPAIRED, BROKEN)]
    assert most_telling(without_margins) == without_margins[::-1]


def test_a_sample_is_a_line_with_names_and_margins() -> None:
    table = sample_table([BROKEN, REPAIRED], NAMES.__getitem__)
    assert table.rows == (
        Row("4", ("dog", "dog", "cat", "0.5", "-0.25", "", "night")),
        Row("2", ("owl", "cat", "owl", "-1", "0.5", "yes", "")),
    )


def test_classes_without_flips_are_left_out_and_the_most_broken_come_first() -> None:
    counts = (FlipCounts(5, 0, 2, 1), FlipCounts(4, 0, 0, 2), FlipCounts(6, 2, 0, 0))
    table = class_table([ClassCounts(i, own) for i, own in enumerate(counts)], NAMES.__getitem__)
    assert table.rows == (
        Row("owl", ("8", "100.00 %", "75.00 %", "0", "2")),
        Row("cat", ("8", "62.50 %", "87.50 %", "2", "0")),
    )


def test_the_largest_changes_of_confusions_come_first() -> None:
    cells = [ConfusionCell(0, 0, 5, 9), ConfusionCell(0, 1, 4, 3), ConfusionCell(1, 0, 2, 2), ConfusionCell(2, 0, 5, 1)]
    assert confusion_changes(cells) == [cells[3], cells[1]]


def headings(report: RepairReport) -> list[str]:
    return [block.text for block in Page(tuple(sample_blocks(report))).blocks if isinstance(block, Heading)]


def test_an_update_shows_the_samples_against_the_replaced_model() -> None:
    repaired = SplitReport("val", "known", TargetCounts(5, 0, 1, 0), flipped=(REPAIRED,))
    against_old = SplitReport("val", "known", TargetCounts(5, 1, 0, 0), flipped=(BROKEN,))
    report = RepairReport("repaired", "", (), "", "", "", (repaired,))
    assert headings(report) == ["Repaired in val, by position in the data set"]
    updated = replace(report, update=(UpdateSplit(repaired, against_old),))
    assert headings(updated) == ["Broken in val, by position in the data set"]


def test_a_class_without_a_name_is_its_number() -> None:
    report = RepairReport("repaired", "", (), "", "", "", (), class_names=("cat",))
    assert [report.class_name(label) for label in (0, 1, -1)] == ["cat", "1", "-"]
