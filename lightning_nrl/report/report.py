"""The base of results that are written as JSON and shown as a page."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_nrl._utils.json_records import Record
from lightning_nrl.report.html import html_fragment, html_page
from lightning_nrl.report.page import Page, Shown
from lightning_nrl.report.sample_views import SampleView


class Report(Record, Shown):
    """A frozen dataclass of results. `rich.print(report)` shows it as tables."""

    @abstractmethod
    def page(self, full: bool = False) -> Page:
        """The page of the report.

        Args:
            full: for a reviewer, with all samples and whole paths; else for the console.
        """

    def to_table(self) -> Page:
        """The page for the console, for rich's `print`."""
        return self.page()

    def to_markdown(self) -> str:
        """The page for a reviewer as Markdown: all of it, with whole paths."""
        return self.page(full=True).markdown()

    def to_html(self, views: Sequence[SampleView] = (), changes: Mapping[str, Tensor] | None = None) -> str:
        """The page for a reviewer as one HTML file that needs nothing else, with figures if matplotlib is installed.

        Args:
            views: flipped samples to be shown.
            changes: what was added to each weight, whole tensors by the names of the state dict, to be drawn.
        """
        page = self.page(full=True)
        return html_page(page.title, page)

    def _repr_html_(self) -> str:
        """What a notebook shows: the page for the console."""
        return html_fragment(self.page())
