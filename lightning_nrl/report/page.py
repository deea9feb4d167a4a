"""Pages of headings, text, tables and facts, rendered as Markdown, as HTML or by rich."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich.box import SIMPLE_HEAD, Box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text as RichText

from lightning_nrl.errors import visible

Tone = Literal["", "good", "warn", "bad"]
TONE_STYLES = {"": "", "good": "green", "warn": "yellow", "bad": "red"}
COLUMN_GAP = 2  # characters
PLAIN_HEAD = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
# Code in backticks stays as written, unless it has a `|`, which ends a table cell, or a `<`, which
# may begin a tag.
SPECIAL = re.compile(r"((?<!`)`[^`|<]+`(?!`))|[\\|*`\[\]!<]|://|www\.")
# TensorBoard ignores a backslash before `<`, and bare addresses would become links.
ESCAPES = {"<": "&lt;", "://": ":\u200b//", "www.": "www\u200b."}
# Console width for tables, so that rich does not shrink them: `Table.within` has split them.
WIDEST = 100_000


@dataclass(frozen=True)
class Heading:
    """A heading. Level 1 is the title of the page."""

    text: str
    level: int = 2
    tone: Tone = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Tone `good` highlights all of its cells, tone `bad` only the cells that are not 0.
    """

    label: str
    cells: Sequence[str]
    tone: Tone = ""
    ends_group: bool = False  # True: a gap follows


@dataclass(frozen=True)
class Table:
    """A table of labelled rows. If it is too wide for the page, its last columns continue below.

    Each of `columns` is a pair: a name, and a kind, such as a role, which stands below the name.
    Both may be empty. Columns are aligned to the right. If `notes` is True, the last column holds
    words and is aligned to the left.
    """

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Row]
    notes: bool = False

    @property
    def headed(self) -> bool:
        return any(name or kind for name, kind in self.columns)

    def within(self, width: int) -> Iterator[Table]:
        """Splits the table to fit `width` characters. A wide column stays whole."""
        label_width = max((len(row.label) for row in self.rows), default=0)
        widths = []
        for i, head in enumerate(self.columns):
            cells = (row.cells[i] for row in self.rows)
            widths.append(COLUMN_GAP + max(map(len, (*head, *cells))))
        start = 0
        while start < len(widths):
            stop = start + 1
            while stop < len(widths) and label_width + sum(widths[start : stop + 1]) <= width:
                stop += 1
            rows = [replace(row, cells=row.cells[start:stop]) for row in self.rows]
            yield Table(self.columns[start:stop], rows, self.notes and stop == len(widths))
            start = stop


@dataclass(frozen=True)
class FactList:
    """A list of facts, each a name and a short statement."""

    items: Sequence[tuple[str, str]]


Block = Heading | Text | Table | FactList


@dataclass(frozen=True)
class Page:
    """A page: its blocks from top to bottom."""

    blocks: Sequence[Block]

    @property
    def title(self) -> str:
        return next((block.text for block in self.blocks if isinstance(block, Heading)), "")

    def markdown(self) -> str:
        """Renders the page as Markdown for GitHub and for TensorBoard's text tab."""
        return "\n\n".join(_markdown(block) for block in self.blocks) + "\n"

    def plain(self, width: int = 80) -> str:
        """Renders the page as text in lines of at most `width` characters.

        Never breaks longer words, such as paths, so that they can be copied.
        """
        console = Console(
            width=WIDEST, color_system=None, force_jupyter=False, legacy_windows=False
        )
        with console.capture() as capture:
            for part in self._parts(width, plain=True):
                part_width = WIDEST
                if not isinstance(part, Padding):  # no table
                    part_width = max(width, Measurement.get(console, console.options, part).minimum)
                console.print(part, width=part_width)
        return "\n".join(map(str.rstrip, capture.get().splitlines())) + "\n"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts(options.max_width)

    def _parts(self, width: int, plain: bool = False) -> Iterator[RenderableType]:
        for i, block in enumerate(self.blocks):
            if i:
                yield ""
            yield from _rich(block, width, plain)


class Renderable(ABC):
    """Base class of results that are shown as a page, also by `rich.print(result)`."""

    @abstractmethod
    def to_table(self) -> Page:
        """Builds the page for the console."""

    def render(self, width: int = 80) -> str:
        return self.to_table().plain(width)

    def to_markdown(self) -> str:
        return self.to_table().markdown()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Page]:
        yield self.to_table()


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_escaped(block.text)}"
    if isinstance(block, Text):
        return _escaped(block.text)
    if isinstance(block, Table):
        return _markdown_table(block)
    return "\n".join(f"- **{_escaped(name)}**: {_escaped(value)}" for name, value in block.items)


def _markdown_table(table: Table) -> str:
    heads, rules = [""], ["---"]
    for name, kind in table.columns:
        heads.append(_escaped(f"{name} ({kind})" if kind else name))
        rules.append("---:")
    if table.notes:
        rules[-1] = "---"
    lines = [heads, rules]
    for row in table.rows:
        mark = "**" if row.tone else ""
        lines.append([f"{mark}{_escaped(cell)}{mark}" for cell in (row.label, *row.cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Escapes names and ids, which come from data, so that they do not become links or tags."""
    return visible(" ".join(SPECIAL.sub(_escape, text).split()))


def _escape(match: re.Match[str]) -> str:
    if match[1]:  # code
        return match[1]
    return ESCAPES.get(match[0], f"\\{match[0]}")


def _line(text: str, style: str = "") -> RichText:
    return RichText(visible(text), style)


def _rich(block: Block, width: int, plain: bool) -> Iterator[RenderableType]:
    if isinstance(block, Heading):
        style = f"bold {TONE_STYLES[block.tone]}".strip()
        yield _line(block.text.upper() if block.level == 1 else block.text, style)
        if plain and block.level > 1:
            yield _line("-" * min(len(block.text), width))
    elif isinstance(block, Text):
        yield _line(" ".join(block.text.split()))
    elif isinstance(block, FactList):
        names_width = max((len(name) for name, _ in block.items), default=0)
        for name, value in block.items:
            grid = Grid.grid(padding=(0, COLUMN_GAP, 0, 0))
            grid.add_column(style="dim", no_wrap=True, width=names_width)
            grid.add_column(overflow="fold")
            grid.add_row(_line(name), _line(" ".join(value.split())))
            yield grid
    else:
        box = PLAIN_HEAD if plain else SIMPLE_HEAD
        gap = 0
        for part in block.within(width):
            yield Padding(_rich_table(part, box), (gap, 0, 0, 0))
            gap = 1


def _rich_table(table: Table, box: Box) -> Grid:
    # The box adds one space between columns.
    grid = Grid(
        box=box,
        show_edge=False,
        show_header=table.headed,
        padding=(0, COLUMN_GAP - 1, 0, 0),
        pad_edge=False,
    )
    grid.add_column("", no_wrap=True)
    with_kinds = any(kind for _, kind in table.columns)
    for name, kind in table.columns:
        head = RichText().append(visible(name), "bold")
        if with_kinds:
            head.append("\n").append(visible(kind), "not bold dim")
        grid.add_column(head, justify="right", no_wrap=True)
    if table.notes:
        grid.columns[-1].justify = "left"
        grid.columns[-1].no_wrap = False
    for row in table.rows:
        bold = "bold" if row.tone else ""
        style = f"{bold} {TONE_STYLES[row.tone]}".strip()
        cells = []
        for cell in row.cells:
            is_fine = row.tone == "bad" and cell == "0"
            cells.append(_line(cell, TONE_STYLES["good"] if is_fine else style))
        grid.add_row(_line(row.label, bold), *cells)
        if row.ends_group and row is not table.rows[-1]:
            grid.add_row()
    return grid
