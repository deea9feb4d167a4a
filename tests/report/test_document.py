from __future__ import annotations

import io

from rich.console import Console

from lightning_nrl.report.page import Facts, Heading, Page, Row, Table, Text

TABLE = Table(
    columns=(("train", "known"), ("test", "unseen")),
    rows=(Row("samples", ("1,000", "20"), ends_group=True), Row("broken", ("0", "3"), "harm")),
)
PAGE = Page(
    (
        Heading("Done", 1, "good"),
        Text("All went well, and nobody was hurt."),
        TABLE,
        Heading("More"),
        Facts((("file", "a/b.ckpt"), ("target", "where a|b < c"))),
    )
)


def console(width: int) -> Console:
    return Console(width=width, color_system=None)


def shown(width: int) -> str:
    screen = console(width)
    with screen.capture() as capture:
        screen.print(PAGE)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def test_plain_text() -> None:
    assert PAGE.plain(40) == (
        "DONE\n\n"
        "All went well, and nobody was hurt.\n\n"
        "         train    test\n"
        "         known  unseen\n"
        "----------------------\n"
        "samples  1,000      20\n\n"
        "broken       0       3\n\n"
        "More\n----\n\n"
        "file    a/b.ckpt\n"
        "target  where a|b < c\n"
    )


def test_markdown_escapes_what_would_be_markup() -> None:
    assert PAGE.markdown() == (
        "# Done\n\n"
        "All went well, and nobody was hurt.\n\n"
        "|  | train (known) | test (unseen) |\n"
        "| --- | ---: | ---: |\n"
        "| samples | 1,000 | 20 |\n"
        "| **broken** | **0** | **3** |\n\n"
        "## More\n\n"
        "- **file**: a/b.ckpt\n"
        "- **target**: where a\\|b &lt; c\n"
    )


def test_rich() -> None:
    assert shown(40) == (
        "DONE\n\n"
        "All went well, and nobody was hurt.\n\n"
        "         train    test\n"
        "         known  unseen\n"
        "──────────────────────\n"
        "samples  1,000      20\n\n"
        "broken       0       3\n\n"
        "More\n\n"
        "file    a/b.ckpt\n"
        "target  where a|b < c"
    )


def test_a_wide_table_goes_on_below() -> None:
    narrow = PAGE.plain(20)
    assert "         train\n         known\n" in narrow
    assert "           test\n         unseen\n" in narrow
    assert max(map(len, narrow.splitlines())) <= 20
    assert [piece.columns for piece in TABLE.within(20)] == [(("train", "known"),), (("test", "unseen"),)]
    assert [piece.columns for piece in TABLE.within(22)] == [TABLE.columns]


def test_notes_that_go_on_below_have_no_empty_head() -> None:
    rows = (Row("fit", ("3", "some steps")), Row("polish", ("12", "as long as it takes")))
    page = Page((Table((("repaired", ""), ("", "")), rows, notes=True),))
    assert page.plain(30) == (
        "        repaired\n----------------\nfit            3\npolish        12\n\n"
        "fit     some steps\npolish  as long as it takes\n"
    )
    console = Console(width=30, file=io.StringIO(), color_system=None)
    console.print(page)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines[-3:] == ["", "fit     some steps", "polish  as long as it takes"]


def test_one_column_is_shown_however_narrow() -> None:
    assert [len(piece.columns) for piece in TABLE.within(1)] == [1, 1]


def test_long_words_are_never_broken() -> None:
    path = "logs/" + "x" * 90
    assert path in Page((Facts((("file", path),)), Text(f"see {path}"))).plain(30)
