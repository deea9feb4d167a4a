"""A page as one HTML file that needs nothing else: no network, no scripts but its own, readable on paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from lightning_nrl.report.page import Block, Page
from lightning_nrl.report.sample_views import SampleView

PAGE_FILES = Path(__file__).parent
TEMPLATES = Environment(loader=FileSystemLoader(PAGE_FILES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
STYLE, SCRIPT = ((PAGE_FILES / name).read_text(encoding="utf-8") for name in ("report.css", "table.js"))
"""Of the page, and of its tables that are sorted and filtered; TensorBoard's tab has the same."""


@dataclass(frozen=True)
class HtmlTable:
    """A table of any length that a reader sorts by its heads and filters by words.

    Attributes:
        title: the heading above it.
        columns: the heads.
        rows: cells as text, a row for each line.
    """

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
    """A whole document.

    Args:
        title: of the window.
        page: what it shows; the figures stand behind its first table.
        figures: SVG by caption.
        tables: come last.
        galleries: by heading the samples under it, behind the figures.
    """
    body = {"blocks": page.blocks, "figures": figures or {}, "tables": tables, "galleries": galleries or {}}
    return _macro("document")(title, body, STYLE, SCRIPT)


def html_fragment(page: Page) -> str:
    """The page as a part of another document, such as a notebook; without scripts."""
    return _macro("fragment")({"blocks": page.blocks, "figures": {}, "tables": (), "galleries": {}}, STYLE)


def html_blocks(blocks: Iterable[Block]) -> str:
    """Blocks of a page as a part of another document that has the style."""
    return "\n".join(_macro("shown")(block) for block in blocks)


def svg_of(figure: Any) -> str:
    """A matplotlib figure as an `<svg>` element, the same for the same figure."""
    from matplotlib import rc_context

    text = StringIO()
    with rc_context({"svg.hashsalt": "lightning_nrl", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    found = text.getvalue()
    return found[found.index("<svg") :]


def _macro(name: str) -> Callable[..., str]:
    macro = getattr(TEMPLATES.get_template("page.html.jinja").module, name)
    return lambda *arguments: str(macro(*arguments))
