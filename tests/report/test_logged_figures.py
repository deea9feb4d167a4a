"""Figures that loggers get beside those of the page: the summary, the course of the search, the change of weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.report import LocalizationReport, RepairReport, SearchReport, SplitReport, UpdateSplit
from lightning_nrl.report._figures import image_of
from lightning_nrl.report.repair_plot import draw_repair, gallery_figures, repair_figures
from lightning_nrl.report.sample_records import ConfusionCell
from lightning_nrl.report.sample_views import SampleView
from lightning_nrl.report.search_plot import search_figure
from lightning_nrl.report.summary_plot import HARM_COLOUR, summary_figure, summary_rows
from lightning_nrl.report.weight_plot import grid_of, weight_figures

KNOWN = SplitReport("val", "known", TargetCounts(90, 0, 7, 3, targeted=10, repaired_in_target=7))
UNSEEN = SplitReport("test", "unseen", TargetCounts(15, 1, 3, 1, targeted=4, repaired_in_target=3))
REPORT = RepairReport("repaired", "", ("head",), "label 3", "instance", "Multiclass", (KNOWN, UNSEEN))


def test_the_summary_has_what_a_reviewer_decides_on() -> None:
    roles, rows = summary_rows(REPORT)
    assert roles == ("known", "unseen")
    assert rows == [
        ("samples", ("100", "20")),
        ("repaired in target (RR)", ("7 of 10", "3 of 4")),
        ("repaired, all", ("7", "3")),
        ("broken (BR)", ("0 of 90", "1 of 16")),
        ("negative flip rate (NFR)", ("0.00 %", "5.00 %")),
        ("accuracy before", ("90.00 %", "80.00 %")),
        ("accuracy after", ("97.00 %", "90.00 %")),
    ]


def test_the_summary_of_an_update_counts_against_the_replaced_model() -> None:
    trained = replace(KNOWN, counts=TargetCounts(80, 10, 7, 3))
    now = replace(KNOWN, counts=TargetCounts(88, 2, 7, 3))
    found = dict(summary_rows(replace(REPORT, update=(UpdateSplit(trained, now),)))[1])
    assert found["regressions"] == ("10 -> 2", "-")
    assert found["negative flip rate (NFR)"] == ("2.00 %", "5.00 %")
    assert found["broken (BR)"] == ("0 of 90", "1 of 16")


def test_the_summary_of_refused_weights_says_what_they_would_do() -> None:
    pytest.importorskip("matplotlib")
    would = replace(KNOWN, counts=TargetCounts(88, 2, 9, 1, targeted=10, repaired_in_target=9))
    refused = replace(REPORT, status="refused", candidate=(would,))
    texts = {text.get_text(): text.get_color() for text in summary_figure(refused).axes[0].texts}
    assert "Refused (what it would do)" in texts
    assert "unseen" not in texts
    assert texts["2 of 90"] == HARM_COLOUR
    accepted = {text.get_text(): text.get_color() for text in summary_figure(REPORT).axes[0].texts}
    assert (accepted["1 of 16"] == HARM_COLOUR, accepted["0 of 90"] == HARM_COLOUR) == (True, False)


def test_names_with_dollars_are_no_mathematics() -> None:
    pytest.importorskip("matplotlib")
    name = r"$\nonsense{$"
    cells = (ConfusionCell(0, 0, 5, 4), ConfusionCell(0, 1, 0, 1))
    report = replace(REPORT, target=name, splits=(replace(KNOWN, confusion=cells),), class_names=(name, "b"))
    views = [SampleView("val", 1, "broken", name, np.zeros((4, 4, 3), dtype=np.uint8))]
    figures = {**repair_figures(report), **gallery_figures(views), "": draw_repair(report), "s": summary_figure(report)}
    assert all(image_of(figure).std() > 0 for figure in figures.values())
    assert len(figures) == 4


def test_a_large_tensor_is_shown_by_its_largest_changes() -> None:
    change = torch.zeros(300, 1000)
    change[0, 3], change[0, 2], change[299, 999] = -2.0, 1.0, 0.5
    grid = grid_of(change)
    assert grid.shape == (100, 250)
    assert (grid[0, 0], grid[99, 249]) == (-2.0, 0.5)
    assert (grid != 0).sum() == 2
    assert grid_of(torch.tensor([1.0, 0.0])).tolist() == [[1.0, 0.0]]
    assert grid_of(torch.ones(2, 3, 4)).shape == (2, 12)


def test_the_tensors_that_moved_are_listed_by_how_far() -> None:
    pytest.importorskip("matplotlib")
    changes = {
        "body.weight": torch.tensor([[0.5, 0.0]]),
        "head.weight": torch.tensor([[3.0, 0.0], [4.0, 0.0]]),
        "head.bias": torch.zeros(2),
    }
    sizes = {"localized": 2, "total": 4}
    figures = weight_figures(changes, LocalizationReport(None, 1, sizes))
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
    pytest.importorskip("matplotlib")
    history: dict[str, Any] = {"patched": [0, 1, 2], "intact": [6, 6, 5], "best": [0.5, 1.5, 2.5], "mean": [-9, 0, 1]}
    search = SearchReport(2, "patience", 2.5, 0.5, history, 1, 6)
    samples, fitness = search_figure(search).axes[:2]
    assert [one.get_title() for one in search_figure(search).axes] == ["best so far: samples", "fitness"]
    assert [list(line.get_ydata()) for line in samples.lines] == [[0, 1, 2], [0, 0, 1]]
    assert fitness.get_ylim()[0] == pytest.approx(0.2)  # the mean of the beginning is far below
    assert search_figure(replace(search, history={"best": [0.5]})) is None
