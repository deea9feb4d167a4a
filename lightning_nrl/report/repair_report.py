"""The account of one repair, with its page and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_nrl.report._figures import Plotted
from lightning_nrl.report.html import Report
from lightning_nrl.report.page import Page
from lightning_nrl.report.repair_page import html_of_repair, page_of_repair
from lightning_nrl.report.repair_plot import draw_repair
from lightning_nrl.report.run_records import RepairRecord
from lightning_nrl.report.sample_views import SampleView


class RepairReport(RepairRecord, Report, Plotted):
    """The account of one repair. `rich.print(report)` shows it as a table, a notebook too.

    Its data are the attributes of :class:`RepairRecord`.
    """

    def page(self, full: bool = False) -> Page:
        return page_of_repair(self, full)

    def figure(self) -> Any:
        return draw_repair(self)

    def to_html(self, views: Sequence[SampleView] = (), changes: Mapping[str, Tensor] | None = None) -> str:
        return html_of_repair(self, views, changes)
