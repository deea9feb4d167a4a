"""Figures of a report: its panels, and those that loggers and reviewers get beside them."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from repository import ROOT

from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.records import (
    LocalizationReport,
    Rung,
    SearchReport,
    SplitReport,
    StrengthPoint,
)
from lightning_nrl.records.splits import ConfusionCell, MarginHistogram
from lightning_nrl.report import RepairReport
from lightning_nrl.report.figures import GREEN, RED, image_of
from lightning_nrl.report.repair_plot import (
    HARM_COLOUR,
    gallery_figures,
    repair_figures,
    summary_columns,
    summary_figure,
    weight_figures,
)
from lightning_nrl.report.sample_views import SampleView

pytest.importorskip("matplotlib")

CELLS = (ConfusionCell(0, 0, 5, 4), ConfusionCell(0, 1, 0, 1), ConfusionCell(1, 0, 1, 0))
KNOWN = SplitReport(
    "val", "known", TargetCounts(90, 0, 7, 3, targeted=10, repaired_in_target=7), confusion=CELLS
)
KNOWN = replace(KNOWN, margins=MarginHistogram((-1.0, 0.0, 1.0), (1, 6), (1, 6)))
UNSEEN = SplitReport("test", "unseen", TargetCounts(15, 1, 3, 1, targeted=4, repaired_in_target=3))
SEARCH = SearchReport(1, "patience", 1.0, 0.5, {"patched": [0, 1], "intact": [6, 5]}, 1, 6)
REPORT = RepairReport(
    *("repaired", "", ("head",), "label 3", "instance", "Multiclass", (KNOWN, UNSEEN)),
    search=SEARCH,
    strength=(
        StrengthPoint(0.5, 0, FlipCounts(6, 0, 0, 1)),
        StrengthPoint(1.0, 1, FlipCounts(5, 1, 1, 0)),
    ),
    chosen_strength=1.0,
)


def luminance(colour: str) -> float:
    """The relative luminance of the Web Content Accessibility Guidelines, plus 0.05."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722)) + 0.05


def test_repaired_and_broken_differ_without_colour_too():
    style = (ROOT / "lightning_nrl/report/tensorboard_plugin/static/tab.css").read_text()
    colours = {name: re.findall(rf"--{name}: (#\w+)", style) for name in ("repaired", "broken")}
    papers = ["#ffffff", "#161616"] * 2  # light and dark, by the browser and by TensorBoard
    for repaired, broken in [*zip(*colours.values(), strict=True), (GREEN, RED)]:
        assert (
            max(luminance(repaired) / luminance(broken), luminance(broken) / luminance(repaired))
            > 1.9
        )
    for shades in colours.values():
        for shade, paper in zip(shades, papers, strict=True):
            assert max(luminance(shade) / luminance(paper), luminance(paper) / luminance(shade)) > 3


PANELS = [
    "Margins of known data",
    "Change of the confusion matrix, known data",
    "How far to go, samples by strength",
    "Course of the search",
]


def test_there_is_a_panel_for_all_that_has_data_together_and_by_itself():
    assert list(repair_figures(REPORT)) == PANELS
    assert REPORT.to_html().count("<svg") == len(PANELS)
    margins, matrix, strength, search = REPORT.plot().axes
    assert [patch.get_data().values.tolist() for patch in margins.patches] == [[1, 6], [1, 6]]
    cells = [(text.get_position(), text.get_text()) for text in matrix.texts]
    assert cells == [((0, 0), "-1"), ((1, 0), "+1"), ((0, 1), "-1")]
    shades = matrix.images[0].get_array().tolist()
    assert shades == [[-1, -1], [1, 0]]  # for the worse, the worse, the better
    assert [list(line.get_ydata()) for line in strength.lines[:2]] == [[0, 0, 1], [0, 0, 1]]
    assert [list(line.get_ydata()) for line in search.lines] == [[0, 1], [0, 1]]
    bare = replace(
        REPORT,
        splits=(replace(KNOWN, margins=None, confusion=()),),
        search=None,
        strength=(),
    )
    assert repair_figures(bare) == {}
    assert "<svg" not in bare.to_html()


def test_where_many_classes_changed_the_largest_changes_are_bars():
    cells = tuple(ConfusionCell(i, i + 10, 0, i + 1) for i in range(10))
    figures = repair_figures(replace(REPORT, splits=(replace(KNOWN, confusion=cells),)))
    (axes,) = figures["Confusions that changed, known data"].axes
    assert [bar.get_width() for bar in axes.patches] == list(range(1, 11))
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "9 taken for 19"
    assert not any("matrix" in title for title in figures)


def test_pictures_are_drawn_side_by_side_and_text_is_left_out():
    views = [
        SampleView("val", i, "broken", str(i), np.full((4, 5, 3), i, dtype=np.uint8))
        for i in range(4)
    ]
    figures = gallery_figures([*views, SampleView("val", 9, "repaired", "", text="words")])
    assert list(figures) == ["broken in val"]
    (axes,) = figures["broken in val"].axes
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2", "3"]


def test_the_summary_has_what_a_reviewer_decides_on():
    columns = summary_columns(REPORT)
    assert list(columns) == ["known", "unseen"]
    assert {label: cell.text for label, cell in columns["unseen"].items()} == {
        "samples": "20",
        "repaired in target (RR)": "3 of 4",
        "repaired, all": "3",
        "broken (BR)": "1 of 16",
        "negative flip rate (NFR)": "5.00 %",
        "accuracy before": "80.00 %",
        "accuracy after": "90.00 %",
    }


def test_the_summary_of_refused_weights_says_what_they_would_do():
    would = replace(KNOWN, counts=TargetCounts(88, 2, 9, 1, targeted=10, repaired_in_target=9))
    refused = replace(REPORT, status="refused", candidate=(would,))
    texts = {text.get_text(): text.get_color() for text in summary_figure(refused).axes[0].texts}
    assert "Refused (what it would do)" in texts
    assert "unseen" not in texts
    assert texts["2 of 90"] == HARM_COLOUR
    accepted = {text.get_text(): text.get_color() for text in summary_figure(REPORT).axes[0].texts}
    assert (accepted["1 of 16"] == HARM_COLOUR, accepted["0 of 90"] == HARM_COLOUR) == (True, False)


def test_names_with_dollars_are_no_mathematics():
    name = r"$\nonsense{$"
    report = replace(REPORT, target=name, class_names=(name, "b"), search=None, strength=())
    views = [SampleView("val", 1, "broken", name, np.zeros((4, 4, 3), dtype=np.uint8))]
    for figure in (report.plot(), summary_figure(report), *gallery_figures(views).values()):
        assert image_of(figure).std() > 0


def test_the_tensors_that_moved_are_listed_by_how_far():
    changes = {
        "body.weight": torch.tensor([[0.5, 0.0]]),
        "head.weight": torch.tensor([[3.0, 0.0], [4.0, 0.0]]),
        "head.bias": torch.zeros(2),
    }
    figures = weight_figures(changes, LocalizationReport(None, 1, {"localized": 2, "total": 4}))
    assert list(figures) == ["Weights, change by tensor", "Weights, change of head.weight"]
    bars = figures["Weights, change by tensor"].axes[0]
    assert [bar.get_width() for bar in bars.patches] == [0.5, 5.0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["body.weight", "head.weight"]
    assert [text.get_text() for text in bars.texts] == ["1 of 2", "2 of 4"]
    assert bars.get_title("left") == "searched: 2 of 4 weights"
    (image,) = figures["Weights, change of head.weight"].axes[0].images
    assert (image.get_array().tolist(), image.get_clim()) == ([[3.0, 0.0], [4.0, 0.0]], (-4.0, 4.0))
    assert weight_figures({"head.bias": torch.zeros(2)}) == {}
    # A picture of a single row shows nothing.
    assert list(weight_figures({"head.bias": torch.ones(2)})) == ["Weights, change by tensor"]


def test_the_course_of_a_search_says_if_its_result_was_dropped():
    rung = Rung("search", 1, 1, 0, weights_changed=4, seconds=0.5, kept=False)
    for kept, label in ((False, "iteration (result not kept)"), (True, "iteration")):
        report = replace(REPORT, rungs=(replace(rung, kept=kept),))
        axes = repair_figures(report)["Course of the search"].axes[0]
        assert axes.get_xlabel() == label
