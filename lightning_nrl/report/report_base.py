"""The base of reports: data that is written, read and shown, with its page laid out elsewhere."""

from __future__ import annotations

from functools import singledispatch

from lightning_nrl._utils.deserialize import Record
from lightning_nrl.report.page import Page, Shown

__all__ = ["Report", "page_of"]


@singledispatch
def page_of(report: object, full: bool = False) -> Page:
    """The page of a report; the module that lays one out registers its kind of report here.

    Args:
        report: such as a `RepairReport`.
        full: for a reviewer, with all samples and whole paths; else for the console.
    """
    raise TypeError(f"no page is known of a {type(report).__name__}")


class Report(Record, Shown):
    """A frozen dataclass of results. `rich.print(report)` shows it as tables."""

    def to_table(self) -> Page:
        """The page for the console, for rich's `print`."""
        return page_of(self)

    def to_markdown(self) -> str:
        """The page for a reviewer as Markdown: all of it, with whole paths."""
        return page_of(self, full=True).markdown()
