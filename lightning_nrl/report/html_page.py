"""A page as one HTML file that needs nothing else: no network, no scripts but its own, readable on paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from lightning_nrl.report.page import Block, Facts, Heading, Page, Table, Text

__all__ = ["HtmlTable", "html_blocks", "html_fragment", "html_page", "svg_of"]

STYLE, SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("report.css", "table.js"))
"""Of the page, and of its tables that are sorted and filtered; TensorBoard's tab has the same."""
START = 'for (const table of document.querySelectorAll("table.sortable")) sortable(table);'


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

    def html(self, identifier: str) -> str:
        """The table and the field that filters it."""
        heads = "".join(
            f'<th scope="col" aria-sort="none"><button type="button">{escape(name)}</button></th>'
            for name in self.columns
        )
        lines = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>" for cells in self.rows)
        n = len(self.rows)
        return (
            f'<h2 id="{identifier}-title">{escape(self.title)}</h2>\n'
            f'<p><label>Filter <input id="{identifier}" type="search" placeholder="such as: broken val"></label> '
            f'<span id="{identifier}-count" role="status">{n} of {n}</span></p>\n'
            f'<table class="sortable" data-filter="{identifier}" aria-labelledby="{identifier}-title">'
            f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table>"
        )


Gallery = Sequence[tuple[str, str]]
"""Captions, each with what is shown above it, as HTML."""


def html_page(
    title: str,
    page: Page,
    figures: Mapping[str, str] | None = None,
    tables: Sequence[HtmlTable] = (),
    galleries: Mapping[str, Gallery] | None = None,
) -> str:
    """A whole document.

    Args:
        title: of the window.
        page: what it shows; the figures stand behind its first table.
        figures: SVG by caption.
        tables: come last.
        galleries: by heading, stand behind the figures.
    """
    body = html_fragment(page, figures, tables, galleries)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n</head>\n<body>\n{body}\n"
        f'<script type="module">\n{SCRIPT}\n{START}\n</script>\n</body>\n</html>\n'
    )


def html_fragment(
    page: Page,
    figures: Mapping[str, str] | None = None,
    tables: Sequence[HtmlTable] = (),
    galleries: Mapping[str, Gallery] | None = None,
) -> str:
    """The same as a part of another document, such as a notebook; without scripts."""
    parts: list[str] = []
    drawn = _figures(figures or {}) + "".join(_gallery(title, own) for title, own in (galleries or {}).items())
    for block in page.blocks:
        parts += _html(block)
        if isinstance(block, Table) and drawn:
            parts.append(drawn)
            drawn = ""
    parts += [drawn] if drawn else []
    parts += [table.html(f"table-{i}") for i, table in enumerate(tables)]
    return f'<style>{STYLE}</style>\n<div class="report">\n' + "\n".join(parts) + "\n</div>"


def html_blocks(blocks: Iterable[Block]) -> str:
    """Blocks of a page as a part of another document that has the style."""
    return "\n".join(part for block in blocks for part in _html(block))


def svg_of(figure: Any) -> str:
    """A matplotlib figure as an `<svg>` element, the same for the same figure."""
    from matplotlib import rc_context

    text = StringIO()
    with rc_context({"svg.hashsalt": "lightning_nrl", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    found = text.getvalue()
    return found[found.index("<svg") :]


def _figures(figures: Mapping[str, str]) -> str:
    drawn = "\n".join(
        f'<figure role="img" aria-label="{escape(caption)}"><figcaption>{escape(caption)}</figcaption>{svg}</figure>'
        for caption, svg in figures.items()
    )
    return f'<div class="figures">\n{drawn}\n</div>' if drawn else ""


def _gallery(title: str, items: Gallery) -> str:
    shown = "\n".join(f"<figure>{html}<figcaption>{escape(caption)}</figcaption></figure>" for caption, html in items)
    return f'\n<h2>{escape(title)}</h2>\n<div class="gallery">\n{shown}\n</div>'


def _html(block: Block) -> Iterator[str]:
    if isinstance(block, Heading):
        yield f'<h{block.level} class="{block.tone}">{escape(block.text)}</h{block.level}>'
    elif isinstance(block, Text):
        yield f"<p>{escape(block.text)}</p>"
    elif isinstance(block, Facts):
        items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in block.items)
        yield f"<dl>\n{items}\n</dl>"
    else:
        yield _table(block)


def _table(table: Table) -> str:
    last = len(table.columns) - 1
    head = ""
    if table.headed:
        cells = (
            f'<th scope="col">{escape(name)}{f"<small>{escape(kind)}</small>" if kind else ""}</th>'
            for name, kind in table.columns
        )
        head = f"<thead><tr><td></td>{''.join(cells)}</tr></thead>\n"
    lines = []
    for row in table.rows:
        cells = (
            f'<td class="{"words" if table.notes and i == last else "some" if cell != "0" else ""}">{escape(cell)}</td>'
            for i, cell in enumerate(row.cells)
        )
        classes = f"{row.tone} {'ends' if row.ends_group else ''}".strip()
        lines.append(f'<tr class="{classes}"><th scope="row">{escape(row.label)}</th>{"".join(cells)}</tr>')
    return f"<table>{head}<tbody>\n" + "\n".join(lines) + "\n</tbody></table>"
