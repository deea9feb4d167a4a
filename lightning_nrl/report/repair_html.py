"""The HTML page of a repair: what a reviewer reads, with figures and every sample that flipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec

from torch import Tensor

from lightning_nrl.report._formatting import number
from lightning_nrl.report.html_page import HtmlTable, html_page, svg_of
from lightning_nrl.report.page import Page, Text
from lightning_nrl.report.repair_page import page_of_repair
from lightning_nrl.report.repair_report import RepairReport
from lightning_nrl.report.report_base import html_of
from lightning_nrl.report.reviewer_figures import reviewer_figures
from lightning_nrl.report.sample_tables import FLIPPED_COLUMNS, flipped_splits
from lightning_nrl.report.sample_views import SampleView

__all__ = ["html_of_repair"]


@html_of.register
def html_of_repair(
    report: RepairReport, views: Sequence[SampleView] = (), changes: Mapping[str, Tensor] | None = None
) -> str:
    """The whole page for a reviewer, figures where matplotlib is installed, and a table of all flipped samples."""
    page, figures = page_of_repair(report, full=True), {}
    if find_spec("matplotlib") is None:
        hint = "The figures are left out: they need matplotlib (python -m pip install matplotlib)."
        page = Page((*page.blocks, Text(hint)))
    else:
        figures = {title: svg_of(figure) for title, figure in reviewer_figures(report, changes).items()}
    title = f"{report.status.capitalize()}: {report.target}"
    return html_page(title, page, figures, _flipped(report), _galleries(views))


def _galleries(views: Sequence[SampleView]) -> dict[str, list[tuple[str, str]]]:
    """By heading the captions of samples, each with its picture or its text as HTML."""
    found: dict[str, list[tuple[str, str]]] = {}
    for view in views:
        shown = f'<img src="{view.data_uri}" alt="">' if view.pixels is not None else f"<pre>{escape(view.text)}</pre>"
        found.setdefault(f"Inputs of samples {view.flip} in {view.split}", []).append((view.caption, shown))
    return found


def _flipped(report: RepairReport) -> tuple[HtmlTable, ...]:
    rows = []
    for split in flipped_splits(report):
        for one in split.flipped:
            cells = [split.split, str(one.id), one.flip]
            cells += [report.class_name(label) for label in (one.label, one.predicted_before, one.predicted_after)]
            cells += [number(one.margin_before), number(one.margin_after), "yes" if one.in_target else "no", one.slice]
            rows.append(cells)
    return (HtmlTable(f"All {len(rows):,} samples that flipped", FLIPPED_COLUMNS, rows),) if rows else ()
