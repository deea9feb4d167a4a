"""Pages of three reports as a reader has them; `python tests/report/test_stored_pages.py` stores
them anew.
"""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_report_codec import REPORTS

from lightning_nrl.evaluation.deployed_precision import DeployedPrecision
from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.evaluation.stats import upper_limit
from lightning_nrl.records import Judge
from lightning_nrl.records.repair_record import (
    Hashes,
    LocalizationReport,
    SearchReport,
    StrengthPoint,
    WeightChange,
)
from lightning_nrl.records.splits import ClassCounts, ConfusionCell, FlippedSample, SplitReport
from lightning_nrl.records.steps import CUT, CautionPoint, PricePoint, Rung, Step
from lightning_nrl.report import repair_report
from lightning_nrl.report.repair_report import RepairReport
from lightning_nrl.report.sample_views import SampleView

PAGES = Path(__file__).parent / "pages"
HELD_OUT = TargetCounts(96, 4, 12, 8, 15, 10)
SEARCH = Rung("search", 5, 6, 0, 64, 1.25, HELD_OUT, kept=True)
TRAINING = Rung("training", 20, 31, 2, 27_163, 30.0)
GAINED = tuple(FlippedSample(i, "repaired", True, 3, 5, 3, -0.5, 0.25 + i) for i in range(14))
TRAIN = SplitReport("train", "known", TargetCounts(1172, 0, 9, 17, 0, 0), (), GAINED[:9])
VAL = SplitReport("val", "known", TargetCounts(288, 0, 14, 16, 30, 14), tuple(range(30)), GAINED)
TEST = SplitReport(
    "test",
    "unseen",
    TargetCounts(270, 1, 12, 14, 22, 11),
    tuple(range(22)),
    (*GAINED[:12], FlippedSample(17, "broken", False, 3, 3, 5, 1.5, -0.125, "night")),
    (ConfusionCell(3, 5, 13, 2), ConfusionCell(3, 3, 90, 101), ConfusionCell(5, 3, 2, 2)),
    (ClassCounts(3, FlipCounts(90, 1, 12, 1)), ClassCounts(5, FlipCounts(180, 0, 0, 13))),
)
REPAIRED = RepairReport(
    status="repaired",
    reason="14 of 30 targeted failures pass now. "
    "Of 1,460 known samples that passed before, none broke.",
    layers=("classifier",),
    target="confusion 3 -> 5",
    gate="instance",
    task="Multiclass",
    splits=(TRAIN, VAL, TEST),
    leaked={"test": 12},
    localization=LocalizationReport(
        32, 210, {"failed": 80, "passed": 90, "both": 49, "localized": 31, "total": 640}
    ),
    search=SearchReport(
        62, "no better fitness for 20 iterations", 0.25, 1.5, {"best": [0.25, 1.5]}, 30, 1460
    ),
    steps=(
        Step("fit", 20, 9, 12.34, "8 epochs"),
        Step("polish", 19, 0, 3.0, f"4 rounds, {CUT}", was_cut=True),
        Step("swarm", 21, 0, 2.0, "+2"),
    ),
    rungs=(SEARCH, TRAINING),
    choice="`search` is kept: repairs 5 targets.",
    price=(
        PricePoint(0.0, 0, 5, 7),
        PricePoint(0.01, 9, 20, 28, HELD_OUT),
        PricePoint(1.0, 9, 20, 28, HELD_OUT),
    ),
    caution=(CautionPoint(0.0, HELD_OUT), CautionPoint(0.1, HELD_OUT, chosen=True)),
    strength=(
        StrengthPoint(0.2, 4, FlipCounts(1460, 0, 6, 50), FlipCounts(270, 0, 3, 20)),
        StrengthPoint(1.15, 21, FlipCounts(1460, 0, 30, 26), FlipCounts(269, 1, 12, 11)),
    ),
    chosen_strength=1.15,
    change=WeightChange(31, 640, 0.123, 0.0123, 0.04),
    hashes=Hashes("a" * 64, "b" * 64, "c" * 64, "d" * 64),
    judge=Judge(DeployedPrecision("cpu", ("float32",)), 1e-6, 3),
    seed=7,
    seconds={"collect": 0.3, "search": 3.21},
    passes={"collect": 1.0, "judge": 1.06, "checks": 0.012},
    versions={"python": "3.12.0", "torch": "2.9.0"},
    files={
        "checkpoint": "logs/version_0/repair/repaired.ckpt",
        "json": "logs/version_0/repair/report.json",
    },
    settings={"n_passed": None, "method": {"particles": 100}},
    class_names=("0", "1", "2", "three", "4", "five"),
)
REFUSED = replace(
    REPAIRED,
    status="refused",
    reason="Of 1,460 known samples that passed before, 3 would break (3 in val); "
    "the gate allows none.",
    splits=(
        SplitReport("train", "known", TargetCounts(1172, 0, 0, 26, 0, 0)),
        SplitReport("val", "known", TargetCounts(288, 0, 0, 30, 30, 0), tuple(range(30))),
        SplitReport("test", "unseen", TargetCounts(271, 0, 0, 26, 22, 0), tuple(range(22))),
    ),
    candidate=(TRAIN, replace(VAL, counts=replace(VAL.counts, kept=285, broken=3))),
    hashes=Hashes("a" * 64, "a" * 64),
    files={},
    rungs=(),
    choice="",
    price=(),
    steps=(),
    strength=(),
    leaked={},
)
WHOLE = replace(REPORTS["repair"], layers=tuple(f"block.{i}" for i in range(28)))
SHOWN = {"repaired": REPAIRED, "refused": REFUSED, "update": WHOLE, "release": REPORTS["release"]}


def pages(report: RepairReport) -> dict[str, str]:
    """The page of each kind; of HTML only what stands between the style and the script."""
    html = report.to_html().partition('<div class="report">')[2].partition("<script")[0]
    return {"txt": report.render(100), "md": report.to_markdown(), "html": html}


@pytest.mark.parametrize("kind", ["txt", "md", "html"])
@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.usefixtures("without_figures")
def test_a_page_is_the_stored_one(name, kind):
    stored = (PAGES / f"{name}.{kind}").read_text(encoding="utf-8")
    assert pages(SHOWN[name])[kind].splitlines() == stored.splitlines()


@pytest.mark.parametrize("width", [60, 120])
@pytest.mark.parametrize("name", SHOWN)
def test_the_screen_shows_the_same_words_as_plain_text_within_the_width(name, width):
    report = replace(SHOWN[name], files={})
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(report)
    assert max(map(len, capture.get().splitlines())) <= width
    text = report.render(width)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= width
    plain, shown = text.split(), capture.get().split()
    assert [word for word in shown if word.strip("─")] == [
        word for word in plain if word == "-" or word.strip("-")
    ]


def test_a_screen_shows_paths_from_here_and_a_file_shows_them_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(Path.cwd() / "logs" / "repaired.ckpt")
    report = replace(REPAIRED, files={"checkpoint": checkpoint, "json": "elsewhere/report.json"})
    lines = [line.split("  ")[-1].strip() for line in report.render(120).splitlines()]
    assert lines[-2:] == [str(Path("logs/repaired.ckpt")), "elsewhere/report.json"]
    assert f"- **checkpoint**: {checkpoint}" in report.to_markdown()


class Open(HTMLParser):
    """Asserts that each element of a document is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags = []
        self.feed(text)
        assert self.tags == []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag not in ("meta", "input", "img", "br"):
            self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.tags.pop() == tag


@pytest.mark.usefixtures("without_figures")
def test_a_document_closes_what_it_opens_and_fetches_nothing():
    picture = SampleView("val", 7, "broken", "7: true <cat>", np.zeros((4, 4, 3), dtype=np.uint8))
    text = SampleView("val", 2, "repaired", "2: true dog", text="a <b> c")
    html = REPAIRED.to_html([picture, text])
    Open(html)
    assert html.count("<script") == html.count("<img") == html.count(" src=") == 1
    assert '<img src="data:image/png;base64,' in html
    assert not re.search(r"href=|srcset=|action=|url\(|@import|fetch\(|XMLHttpRequest", html)
    assert "<pre>a &lt;b&gt; c</pre><figcaption>2: true dog</figcaption>" in html
    assert "they need matplotlib" in html
    assert "<script" not in REPAIRED._repr_html_()


def test_only_changed_weights_have_a_limit_on_unseen_data():
    assert REPAIRED.unseen_limit == upper_limit(1, 271)
    for report in (replace(REPAIRED, splits=(VAL,)), replace(REPAIRED, status="refused")):
        assert report.unseen_limit is None
        assert "samples like these" not in report.to_markdown()


if __name__ == "__main__":
    repair_report.find_spec = lambda name: None
    PAGES.mkdir(exist_ok=True)
    for name, report in SHOWN.items():
        for kind, text in pages(report).items():
            (PAGES / f"{name}.{kind}").write_text(text, encoding="utf-8")
