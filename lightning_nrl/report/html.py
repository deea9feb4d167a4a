"""A page as one HTML file that needs nothing else: no network, no scripts but its own; and the base of what has one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from torch import Tensor
from typing_extensions import Self

from lightning_nrl._utils.json_records import PLAIN_HINT, Record
from lightning_nrl.errors import ConfigurationError, first_line
from lightning_nrl.report.page import Block, Facts, Heading, Page, Shown
from lightning_nrl.report.run_records import Provenance, installed_versions
from lightning_nrl.report.sample_views import SampleView

PAGE_FILES = Path(__file__).parent
TEMPLATES = Environment(loader=FileSystemLoader(PAGE_FILES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
STYLE, SCRIPT = ((PAGE_FILES / name).read_text(encoding="utf-8") for name in ("report.css", "table.js"))


@dataclass(frozen=True)
class HtmlTable:
    """A table of any length that a reader sorts by its heads and filters by words."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def html_page(
    title: str,
    page: Page,
    figures: Mapping[str, str] | None = None,
    tables: Sequence[HtmlTable] = (),
    galleries: Mapping[str, Sequence[SampleView]] | None = None,
) -> str:
    """A whole document with the page; behind its first table SVG by caption and samples by heading, then the tables."""
    body = {"blocks": page.blocks, "figures": figures or {}, "tables": tables, "galleries": galleries or {}}
    return _macro("document", title, body, STYLE, SCRIPT)


def html_blocks(blocks: Iterable[Block]) -> str:
    """Blocks of a page as a part of another document that has the style."""
    return "\n".join(_macro("shown", block) for block in blocks)


def svg_of(figure: Any) -> str:
    """A matplotlib figure as an `<svg>` element, the same for the same figure."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = StringIO()
    with rc_context({"svg.hashsalt": "lightning_nrl", "svg.fonttype": "path"}):
        # `savefig` draws a figure with a layout twice.
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(text, metadata={"Date": None})
    found = text.getvalue()
    return found[found.index("<svg") :]


def _macro(name: str, *arguments: Any) -> str:
    return str(getattr(TEMPLATES.get_template("page.html.jinja").module, name)(*arguments))


@dataclass(frozen=True)
class Report(Record, Shown):
    """Results with the `versions` of the software and their `provenance`. `rich.print(report)` shows them as tables."""

    versions: Mapping[str, str] = field(default_factory=installed_versions, kw_only=True)
    provenance: Provenance = field(default_factory=Provenance, kw_only=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` returns, as `Record.from_dict` does, and refuses what cannot be shown."""
        found = super().from_dict(data)
        try:
            found.page(full=True)
        except Exception as error:
            problem = f"the report cannot be shown ({type(error).__name__}: {first_line(error)})."
            raise ConfigurationError(problem, PLAIN_HINT) from error
        return found

    @abstractmethod
    def page(self, full: bool = False) -> Page:
        """The page of the report.

        Args:
            full: for a reviewer, with all samples and whole paths; else for the console.
        """

    def full_page(self) -> Page:
        """The page for a reviewer, which ends with the provenance."""
        facts = Facts((*self.provenance.facts, *self.versions.items()))
        return Page((*self.page(full=True).blocks, Heading("Where this comes from"), facts))

    def to_table(self) -> Page:
        """The page for the console, for rich's `print`."""
        return self.page()

    def to_markdown(self) -> str:
        """The page for a reviewer as Markdown: all of it, with whole paths."""
        return self.full_page().markdown()

    def to_html(self, views: Sequence[SampleView] = (), changes: Mapping[str, Tensor] | None = None) -> str:
        """The page for a reviewer as one HTML file that needs nothing else, with figures if matplotlib is installed.

        Args:
            views: flipped samples to be shown.
            changes: what was added to each weight, whole tensors by the names of the state dict, to be drawn.
        """
        page = self.full_page()
        return html_page(page.title, page)

    def _repr_html_(self) -> str:
        return _macro("fragment", {"blocks": self.page().blocks, "galleries": {}}, STYLE)
