from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from lightning_nrl.report.html import HtmlTable, html_fragment, html_page, svg_of
from lightning_nrl.report.page import Facts, Heading, Page, Row, Table, Text

HOSTILE = '<script>alert("x")</script><img src=http://evil.test/i.png> & `code`'
PAGE = Page(
    (
        Heading(HOSTILE, 1, "good"),
        Text(HOSTILE),
        Table(
            (("train", "known"), (HOSTILE, "")),
            (Row("broken", ("0", "3"), "harm"), Row(HOSTILE, ("1", HOSTILE), "gain", ends_group=True)),
            notes=True,
        ),
        Facts(((HOSTILE, HOSTILE),)),
    )
)


class Elements(HTMLParser):
    """Notes the elements of a document, and the text in each kind."""

    VOID = ("meta", "input", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def test_a_document_closes_what_it_opens_and_shows_text_as_text() -> None:
    elements = Elements(html_page(HOSTILE, PAGE, tables=[HtmlTable(HOSTILE, ["id", HOSTILE], [["1", HOSTILE]])]))
    assert elements.open == []
    tags = [tag for tag, _ in elements.found]
    assert tags.count("script") == 1
    assert "img" not in tags
    for tag in ("title", "h1", "h2", "p", "dt", "dd", "button"):
        assert HOSTILE in elements.texts[tag]
    assert elements.texts["td"].count(HOSTILE) == 2


def test_nothing_is_fetched() -> None:
    text = html_page("report", PAGE, {"a figure": "<svg></svg>"}, [HtmlTable("all", ["id"], [["1"]])])
    for tag, attributes in Elements(text).found:
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), tag
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", text)


def test_a_fragment_has_no_script() -> None:
    elements = Elements(html_fragment(PAGE))
    assert elements.open == []
    assert "script" not in [tag for tag, _ in elements.found]


def test_figures_stand_behind_the_first_table_with_their_captions() -> None:
    text = html_fragment(PAGE, {"Margins <0": "<svg></svg>"})
    assert text.index("</table>") < text.index("<svg></svg>") < text.index("<dl>")
    assert "<figcaption>Margins &lt;0</figcaption>" in text


def test_what_is_not_0_among_harm_stands_out() -> None:
    rows = re.findall(r'<tr class="harm">.*?</tr>', html_fragment(PAGE))
    assert rows == ['<tr class="harm"><th scope="row">broken</th><td class="">0</td><td class="words">3</td></tr>']


def test_a_sortable_table_says_which_field_filters_it() -> None:
    text = HtmlTable("all", ["id", "flip"], [["1", "broken"], ["2", "repaired"]]).html("table-0")
    elements = Elements(text)
    assert elements.open == []
    (table,) = [attributes for tag, attributes in elements.found if tag == "table"]
    assert table == {"class": "sortable", "data-filter": "table-0", "aria-labelledby": "table-0-title"}
    assert elements.texts["span"] == ["2 of 2"]


def test_a_figure_is_one_svg_the_same_each_time() -> None:
    pytest.importorskip("matplotlib")
    from lightning_nrl.report._figures import new_figure

    def drawn() -> str:
        figure = new_figure(2, 1)
        figure.subplots().plot([0, 1])
        return svg_of(figure)

    first = drawn()
    assert first.startswith("<svg")
    assert first.rstrip().endswith("</svg>")
    assert drawn() == first
