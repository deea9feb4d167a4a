"""Names and texts come from data: a report shows no picture, link or tag made of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from tensorboard.plugin_util import markdown_to_safe_html
from test_report_codec import REPORTS, SPLIT

from lightning_nrl.entrypoints.command_line import main
from lightning_nrl.errors import CONTROL_CHARACTERS
from lightning_nrl.records import SliceReport
from lightning_nrl.report import RepairReport

HOSTILE = [
    "![i](http://evil.example/p.png)",
    "[click](http://evil.example)",
    "[a]: http://evil.example",
    "[r][a]",
    "<img src=http://evil.example/p.png onerror=alert(1)>",
    "<script src='http://evil.example'></script>",
    "</td></table><iframe src=http://evil.example>",
    "http://evil.example www.evil.example <http://evil.example>",
    'a" onmouseover="alert(1)',
    "a\n\n# b\n\n![i](http://evil.example)",
    "a | b \\| c `![i](http://evil.example)`",
    "`a``![i](http://evil.example)` ``[b](http://evil.example)` \\`![c](http://evil.example)",
    "&lt;img src=http://evil.example&gt;",
]


class ActiveTags(HTMLParser):
    """Collects tags that could load or run something, or lead away."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("a", "iframe"):
            self.tags.append(tag)
        for name, value in attrs:
            is_inert = name in ("aria-label", "title", "alt")
            if name.startswith("on") or ("evil" in str(value) and not is_inert):
                self.tags.append(tag)


def named(name: str) -> RepairReport:
    """A report with a name wherever a report has one."""
    report = REPORTS["repair"]
    assert isinstance(report, RepairReport)
    flipped = tuple(replace(sample, slice=name) for sample in SPLIT.flipped)
    return replace(
        report,
        target=f"label {name}",
        reason=name,
        task=name,
        class_names=(name, f"1 {name}"),
        layers=(name,),
        splits=(replace(SPLIT, split=name, flipped=flipped),),
        slices=(SliceReport(name, "known", SPLIT.counts),),
        files={"json": name},
        settings={name: name},
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_a_name_in_markdown(name):
    shown = markdown_to_safe_html(named(name).to_markdown())
    plain = markdown_to_safe_html(named("plain").to_markdown())
    for tag in ("<table", "<tr", "<td", "<h"):
        assert shown.count(tag) == plain.count(tag)
    assert ActiveTags(shown).tags == []
    assert "(JSON)**: `a*b` \\* \\`c" in named("`a*b` * `c").to_markdown()


def test_a_terminal_is_shown_what_it_must_not_obey(tmp_path, capsys):
    path = tmp_path / "report.json"
    path.write_text(
        named("a\x1b[31m\x9b2J\r\x08\u202e\ud800z").to_json(),
        encoding="utf-8",
        errors="surrogatepass",
    )
    text = json.dumps(json.loads(path.read_text(encoding="utf-8", errors="surrogatepass")))
    path.write_text(text)
    assert (main(["inspect", str(path)]), main(["report", str(path)])) == (0, 0)
    assert main(["report", str(path), "--out", str(tmp_path / "report.md")]) == 0
    for shown in (capsys.readouterr().out, (tmp_path / "report.md").read_text()):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", shown)
        assert re.search(r"a\\+x1b\\?\[31m\\+x9b2J", shown)
    path.write_text(text.replace('"status"', '"\\u001b[2J"', 1))
    assert main(["inspect", str(path)]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.usefixtures("without_figures")
def test_names_stay_names_in_html():
    text = named(" ".join((*HOSTILE, "a\x1b[31m\x9b2J\r\x08\u202e\ud800z"))).to_html()
    assert "evil.example" in text
    assert not CONTROL_CHARACTERS.search(text)
    assert ActiveTags(text).tags == []
