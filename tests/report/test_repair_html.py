from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.report import RepairReport, SearchReport, SplitReport, StrengthPoint, repair_html
from lightning_nrl.report.repair_plot import draw_repair, gallery_figures, repair_figures
from lightning_nrl.report.sample_records import ClassCounts, ConfusionCell, FlippedSample, MarginHistogram
from lightning_nrl.report.sample_views import SampleView

SPLIT = SplitReport(
    "val",
    "known",
    TargetCounts(5, 1, 1, 0, 1, 1),
    (2,),
    (
        FlippedSample(2, "repaired", True, 1, 0, 1, -1.0, 0.5),
        FlippedSample(7, "broken", False, 0, 0, 1, 0.5, -0.25, "night"),
    ),
    (ConfusionCell(0, 0, 5, 4), ConfusionCell(0, 1, 0, 1), ConfusionCell(1, 0, 1, 0)),
    (ClassCounts(0, FlipCounts(4, 1, 0, 0)), ClassCounts(1, FlipCounts(1, 0, 1, 0))),
    MarginHistogram((-1.0, 0.0, 1.0), (1, 6), (1, 6)),
)
REPORT = RepairReport(
    status="repaired",
    reason="1 of 1 passes now.",
    layers=("head",),
    target="label <1>",
    gate="accuracy",
    task="Multiclass",
    splits=(SPLIT,),
    search=SearchReport(1, "patience", 1.0, 0.5, {"patched": [0, 1], "intact": [6, 5]}, 1, 6),
    strength=(StrengthPoint(0.5, 0, FlipCounts(6, 0, 0, 1)), StrengthPoint(1.0, 1, FlipCounts(5, 1, 1, 0))),
    chosen_strength=1.0,
    class_names=("cat", "d<o>g"),
)
PANELS = [
    "Margins of known data",
    "Change of the confusion matrix, known data",
    "How far to go, samples by strength",
    "Course of the search",
]


def test_every_flipped_sample_is_in_the_table_with_the_names_of_its_classes() -> None:
    text = REPORT.to_html()
    assert "All 2 samples that flipped" in text
    cells = ("val", "7", "broken", "cat", "cat", "d&lt;o&gt;g", "0.5", "-0.25", "no", "night")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in text
    assert "<title>Repaired: label &lt;1&gt;</title>" in text


def test_there_is_a_figure_for_each_panel_that_has_data() -> None:
    pytest.importorskip("matplotlib")
    assert list(repair_figures(REPORT)) == PANELS
    assert REPORT.to_html().count("<svg") == len(PANELS)
    bare = replace(REPORT, splits=(replace(SPLIT, margins=None, confusion=()),), search=None, strength=())
    assert repair_figures(bare) == {}
    assert "<svg" not in bare.to_html()


def test_all_panels_are_one_figure() -> None:
    pytest.importorskip("matplotlib")
    axes = draw_repair(REPORT).axes
    assert [one.get_title() for one in axes] == PANELS
    (margins, matrix, strength, search) = axes
    assert [patch.get_data().values.tolist() for patch in margins.patches] == [[1, 6], [1, 6]]
    cells = [(t.get_position(), t.get_text(), t.get_visible()) for t in matrix.texts]
    assert cells == [((0, 0), "-1", True), ((1, 0), "+1", True), ((0, 1), "-1", True), ((1, 1), "+0", False)]
    assert matrix.images[0].get_array().tolist() == [[-1, -1], [1, 0]]  # for the worse, the worse, the better
    assert [list(line.get_ydata()) for line in strength.lines[:2]] == [[0, 0, 1], [0, 0, 1]]
    assert [list(line.get_ydata()) for line in search.lines] == [[0, 1], [0, 1]]


def test_where_many_classes_changed_the_largest_changes_are_bars() -> None:
    pytest.importorskip("matplotlib")
    cells = [cell for i in range(10) for cell in (ConfusionCell(i, i + 10, 0, i + 1), ConfusionCell(i, i, 20, 19 - i))]
    figures = repair_figures(replace(REPORT, splits=(replace(SPLIT, confusion=tuple(cells)),)))
    (axes,) = figures["Confusions that changed, known data"].axes
    assert [bar.get_width() for bar in axes.patches] == list(range(1, 11))
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "9 taken for 19"
    assert not any("matrix" in title for title in figures)


def test_without_matplotlib_the_page_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair_html, "find_spec", lambda name: None)
    text = REPORT.to_html()
    assert "<svg" not in text
    assert "they need matplotlib" in text


def test_a_report_is_one_line_and_a_table_in_a_notebook() -> None:
    assert repr(REPORT) == "<RepairReport: repaired; known 1 repaired, 1 broken of 7>"
    assert REPORT._repr_html_().count("<table>") == 1


def test_views_of_samples_are_pictures_and_text_under_the_figures() -> None:
    picture = SampleView("val", 7, "broken", "7: true cat", np.zeros((4, 4, 3), dtype=np.uint8))
    text = SampleView("val", 2, "repaired", "2: true dog", text="a <b> c")
    found = REPORT.to_html([picture, text])
    assert found.count('<img src="data:image/png;base64,') == 1
    assert "<pre>a &lt;b&gt; c</pre><figcaption>2: true dog</figcaption>" in found
    assert found.index("Inputs of samples broken in val") < found.index("Inputs of samples repaired in val")


def test_pictures_are_drawn_side_by_side_and_text_is_left_out() -> None:
    pytest.importorskip("matplotlib")
    views = [SampleView("val", i, "broken", str(i), np.full((4, 5, 3), i, dtype=np.uint8)) for i in range(7)]
    figures = gallery_figures([*views, SampleView("val", 9, "repaired", "", text="words")])
    assert list(figures) == ["broken in val"]
    shown = [axes for axes in figures["broken in val"].axes if axes.images]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in shown] == list(range(7))
    assert shown[3].get_title() == "3"
