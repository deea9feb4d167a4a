"""Figures of a report: its panels, and those that loggers and reviewers get beside them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from repository import ROOT

from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.records import LocalizationReport, SearchReport, SplitReport, StrengthPoint
from lightning_nrl.records.splits import ConfusionCell, MarginHistogram
from lightning_nrl.report import RepairReport
from lightning_nrl.report.figures import GREEN, RED, image_of
from lightning_nrl.report.repair_plot import (
    HARM_COLOUR,
    gallery_figures,
    grid_of,
    repair_figures,
    search_figure,
    summary_figure,
    summary_rows,
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


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast of two colours as the Web Content Accessibility Guidelines have it, from 1 to
    21.
    """
    low, high = sorted(_luminance(colour) + 0.05 for colour in (one, other))
    return high / low


def test_repaired_and_broken_differ_without_colour_too() -> None:
    style = (ROOT / "lightning_nrl/report/tensorboard_plugin/static/tab.css").read_text()
    named = [
        re.findall(rf"--{name}: (#\w+)", style)
        for name in ("repaired", "broken", "fewer", "further")
    ]
    assert len(named[0]) == 4  # light and dark, by the browser and by TensorBoard
    pairs = [*zip(*named[:2], strict=True), *zip(*named[2:], strict=True), (GREEN, RED)]
    assert min(contrast(*pair) for pair in pairs) > 1.9
    papers = ("#ffffff", "#161616") * 2
    assert (
        min(contrast(*pair) for colours in named[:2] for pair in zip(colours, papers, strict=True))
        > 3
    )


PANELS = [
    "Margins of known data",
    "Change of the confusion matrix, known data",
    "How far to go, samples by strength",
    "Course of the search",
]


def test_there_is_a_panel_for_all_that_has_data_together_and_by_itself() -> None:
    assert list(repair_figures(REPORT)) == PANELS
    assert REPORT.to_html().count("<svg") == len(PANELS)
    axes = REPORT.plot().axes
    assert [one.get_title() for one in axes] == PANELS
    (margins, matrix, strength, search) = axes
    assert [patch.get_data().values.tolist() for patch in margins.patches] == [[1, 6], [1, 6]]
    cells = [(text.get_position(), text.get_text()) for text in matrix.texts]
    assert cells == [((0, 0), "-1"), ((1, 0), "+1"), ((0, 1), "-1")]
    assert matrix.images[0].get_array().tolist() == [
        [-1, -1],
        [1, 0],
    ]  # for the worse, the worse, the better
    assert [list(line.get_ydata()) for line in strength.lines[:2]] == [[0, 0, 1], [0, 0, 1]]
    assert [list(line.get_ydata()) for line in search.lines] == [[0, 1], [0, 1]]
    bare = replace(
        REPORT, splits=(replace(KNOWN, margins=None, confusion=()),), search=None, strength=()
    )
    assert repair_figures(bare) == {}
    assert "<svg" not in bare.to_html()


def test_where_many_classes_changed_the_largest_changes_are_bars() -> None:
    cells = [
        cell
        for i in range(10)
        for cell in (ConfusionCell(i, i + 10, 0, i + 1), ConfusionCell(i, i, 20, 19 - i))
    ]
    figures = repair_figures(replace(REPORT, splits=(replace(KNOWN, confusion=tuple(cells)),)))
    (axes,) = figures["Confusions that changed, known data"].axes
    assert [bar.get_width() for bar in axes.patches] == list(range(1, 11))
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "9 taken for 19"
    assert not any("matrix" in title for title in figures)


def test_pictures_are_drawn_side_by_side_and_text_is_left_out() -> None:
    views = [
        SampleView("val", i, "broken", str(i), np.full((4, 5, 3), i, dtype=np.uint8))
        for i in range(7)
    ]
    figures = gallery_figures([*views, SampleView("val", 9, "repaired", "", text="words")])
    assert list(figures) == ["broken in val"]
    (axes,) = figures["broken in val"].axes
    assert [int(image.get_array()[0, 0, 0]) for image in axes.images] == list(range(7))
    assert [text.get_text() for text in axes.texts] == [str(i) for i in range(7)]
    left, right, bottom, top = axes.images[
        3
    ].get_extent()  # the first of the second row, 4 pixels high and 5 wide
    assert (right - left) / (bottom - top) == pytest.approx(5 / 4)
    assert [np.allclose(axes.images[i].get_extent()[:2], (left, right)) for i in (0, 1, 6)] == [
        True,
        False,
        True,
    ]


def test_the_summary_has_what_a_reviewer_decides_on() -> None:
    roles, rows = summary_rows(REPORT)
    assert roles == ("known", "unseen")
    texts = [(label, tuple(cell.text for cell in cells)) for label, cells in rows]
    assert texts == [
        ("samples", ("100", "20")),
        ("repaired in target (RR)", ("7 of 10", "3 of 4")),
        ("repaired, all", ("7", "3")),
        ("broken (BR)", ("0 of 90", "1 of 16")),
        ("negative flip rate (NFR)", ("0.00 %", "5.00 %")),
        ("accuracy before", ("90.00 %", "80.00 %")),
        ("accuracy after", ("97.00 %", "90.00 %")),
    ]
    assert [row.harmful for row in rows if row.harmful] == [(False, True)]


def test_the_summary_of_refused_weights_says_what_they_would_do() -> None:
    would = replace(KNOWN, counts=TargetCounts(88, 2, 9, 1, targeted=10, repaired_in_target=9))
    refused = replace(REPORT, status="refused", candidate=(would,))
    texts = {text.get_text(): text.get_color() for text in summary_figure(refused).axes[0].texts}
    assert "Refused (what it would do)" in texts
    assert "unseen" not in texts
    assert texts["2 of 90"] == HARM_COLOUR
    accepted = {text.get_text(): text.get_color() for text in summary_figure(REPORT).axes[0].texts}
    assert (accepted["1 of 16"] == HARM_COLOUR, accepted["0 of 90"] == HARM_COLOUR) == (True, False)


def test_names_with_dollars_are_no_mathematics() -> None:
    name = r"$\nonsense{$"
    report = replace(REPORT, target=name, class_names=(name, "b"), search=None, strength=())
    views = [SampleView("val", 1, "broken", name, np.zeros((4, 4, 3), dtype=np.uint8))]
    figures = {
        **repair_figures(report),
        **gallery_figures(views),
        "": report.plot(),
        "s": summary_figure(report),
    }
    assert all(image_of(figure).std() > 0 for figure in figures.values())
    assert len(figures) == 5


def test_a_large_tensor_is_shown_by_its_largest_changes() -> None:
    change = torch.zeros(300, 1000)
    change[0, 3], change[0, 2], change[299, 999] = -2.0, 1.0, 0.5
    grid = grid_of(change)
    assert grid.shape == (128, 256)
    assert (grid[0, 0], grid[127, 255]) == (-2.0, 0.5)
    assert grid_of(torch.tensor([1.0, 0.0])).tolist() == [[1.0, 0.0]]
    assert grid_of(torch.ones(2, 3, 4)).shape == (2, 12)


def test_the_tensors_that_moved_are_listed_by_how_far() -> None:
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


def test_the_course_of_a_search_has_a_panel_for_each_kind_of_curve() -> None:
    history: dict[str, Any] = {
        "patched": [0, 1, 2],
        "intact": [6, 6, 5],
        "best": [0.5, 1.5, 2.5],
        "mean": [-9, 0, 1],
    }
    search = replace(SEARCH, history=history)
    samples, fitness = search_figure(search).axes[:2]
    assert [one.get_title() for one in search_figure(search).axes] == [
        "best so far: samples",
        "fitness",
    ]
    assert [list(line.get_ydata()) for line in samples.lines] == [[0, 1, 2], [0, 0, 1]]
    assert fitness.get_ylim()[0] == pytest.approx(0.2)  # the mean of the beginning is far below
    assert search_figure(replace(search, history={"best": [0.5]})) is None
