"""Self-contained HTML pages, and the base class of reports."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from torch import Tensor
from typing_extensions import Self

from lightning_nrl._utils.json_records import PLAIN_HINT, Record
from lightning_nrl.errors import ConfigurationError, first_line, visible
from lightning_nrl.records import Provenance, installed_versions
from lightning_nrl.report.page import Block, FactList, Heading, Page, Renderable
from lightning_nrl.report.sample_views import SampleView

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_FILES = Path(__file__).parent
TEMPLATES = Environment(
    loader=FileSystemLoader(PAGE_FILES), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
STYLE = (PAGE_FILES / "report.css").read_text(encoding="utf-8")
SCRIPT = (PAGE_FILES / "table.js").read_text(encoding="utf-8")


def _prose(text: str) -> Markup:
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


TEMPLATES.filters["prose"] = _prose


@dataclass(frozen=True)
class HtmlTable:
    """A table of any length that a reader can sort and filter."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def html_page(
    title: str,
    page: Page,
    figures: Mapping[str, str] | None = None,
    tables: Sequence[HtmlTable] = (),
    galleries: Mapping[str, Sequence[SampleView]] | None = None,
    n_first: int = 0,
) -> str:
    """Renders a page as HTML.

    `figures` (SVG) and `galleries`, by title, follow its first `n_first` blocks. `tables` come
    last.
    """
    body = {
        "blocks": page.blocks,
        "n_first": n_first,
        "figures": figures or {},
        "tables": tables,
        "galleries": galleries or {},
    }
    return _macro("document", title, body, STYLE, SCRIPT)


def html_blocks(blocks: Iterable[Block]) -> str:
    """Renders blocks of a page as HTML, to be put into another document that loads `report.css`."""
    return "\n".join(_macro("render", block) for block in blocks)


def svg_of(figure: Figure) -> str:
    """Renders a matplotlib figure as an `<svg>` element. Equal figures give equal text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = StringIO()
    with rc_context({"svg.hashsalt": "lightning_nrl", "svg.fonttype": "path"}):
        # Not `savefig`, which draws a figure with a layout twice.
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _macro(name: str, *arguments: object) -> str:
    macro = vars(TEMPLATES.get_template("page.html.jinja").module)[name]
    return visible(str(macro(*arguments)))


@dataclass(frozen=True)
class Report(Record, Renderable):
    """Base class of reports, with the software's `versions` and the results' `provenance`."""

    versions: Mapping[str, str] = field(default_factory=installed_versions, kw_only=True)
    provenance: Provenance = field(default_factory=Provenance, kw_only=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads the result of `to_dict`.

        Raises a `ConfigurationError` if a value is wrong or cannot be shown.
        """
        report = super().from_dict(data)
        try:
            report.page(full=True)
        except Exception as error:
            raise ConfigurationError(
                f"the report cannot be shown ({type(error).__name__}: {first_line(error)}).",
                PLAIN_HINT,
            ) from error
        return report

    @abstractmethod
    def page(self, full: bool = False) -> Page:
        """Builds the page: a summary, or if `full` all samples and full paths for a reviewer."""

    def full_page(self) -> Page:
        """Builds the page for a reviewer. It ends with the provenance."""
        facts = FactList([*self.provenance.facts, *self.versions.items()])
        return Page([*self.page(full=True).blocks, Heading("Provenance"), facts])

    def to_table(self) -> Page:
        return self.page()

    def to_markdown(self) -> str:
        """Renders the full page as Markdown."""
        return self.full_page().markdown()

    def to_html(
        self, views: Sequence[SampleView] = (), changes: Mapping[str, Tensor] | None = None
    ) -> str:
        """Renders the full page as a self-contained HTML document.

        Only a `RepairReport` uses the arguments.

        Args:
            views: pictures or texts of flipped samples to show, such as `Outcome.views`.
            changes: changes of weights to draw, such as `Outcome.changes`. Drawing needs
                matplotlib.
        """
        page = self.full_page()
        return html_page(page.title, page)

    def _repr_html_(self) -> str:
        return _macro("fragment", {"blocks": self.page().blocks}, STYLE)
