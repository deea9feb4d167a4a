"""The base of reports: data that is written, read and shown, with its page laid out elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch

from torch import Tensor

from lightning_nrl._utils.deserialize import Record
from lightning_nrl.report.html_page import html_fragment, html_page
from lightning_nrl.report.page import Heading, Page, Shown
from lightning_nrl.report.sample_views import SampleView

__all__ = ["Report", "html_of", "page_of"]


@singledispatch
def page_of(report: object, full: bool = False) -> Page:
    """The page of a report; the module that lays one out registers its kind of report here.

    Args:
        report: such as a `RepairReport`.
        full: for a reviewer, with all samples and whole paths; else for the console.
    """
    raise TypeError(f"no page is known of a {type(report).__name__}")


@singledispatch
def html_of(report: object, views: Sequence[SampleView] = (), changes: Mapping[str, Tensor] | None = None) -> str:
    """The HTML document of a report: its whole page; the module that has more to show registers its kind here."""
    page = page_of(report, full=True)
    title = next((block.text for block in page.blocks if isinstance(block, Heading)), type(report).__name__)
    return html_page(title, page)


class Report(Record, Shown):
    """A frozen dataclass of results. `rich.print(report)` shows it as tables."""

    def to_table(self) -> Page:
        """The page for the console, for rich's `print`."""
        return page_of(self)

    def to_markdown(self) -> str:
        """The page for a reviewer as Markdown: all of it, with whole paths."""
        return page_of(self, full=True).markdown()

    def to_html(self, views: Sequence[SampleView] = (), changes: Mapping[str, Tensor] | None = None) -> str:
        """The page for a reviewer as one HTML file that needs nothing else, with figures if matplotlib is installed.

        Args:
            views: flipped samples to be shown.
            changes: what was added to each weight, whole tensors by the names of the state dict, to be drawn.
        """
        return html_of(self, views, changes)

    def _repr_html_(self) -> str:
        """What a notebook shows: the page for the console."""
        return html_fragment(page_of(self))
