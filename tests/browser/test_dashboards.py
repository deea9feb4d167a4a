"""What TensorBoard's own dashboards, and report.html, show of a repair in Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_tensorboard import SCREENSHOTS, Browser

from lightning_nrl import RepairReport
from lightning_nrl.localization import TrainingRecord
from lightning_nrl.report import SplitReport

pytestmark = pytest.mark.browser

HEADLINE = "?tagFilter=%5Erepair%2F&smoothing=0#timeseries"
"""The address that docs/tensorboard.md gives."""
RUN = "version_0/repair"


def counts(report: RepairReport) -> tuple[SplitReport, SplitReport]:
    known, unseen = report.pooled("known"), report.pooled("unseen")
    assert known is not None
    assert unseen is not None
    return known, unseen


def test_time_series_say_what_the_report_says(browser: Browser, report: RepairReport) -> None:
    known, unseen = counts(report)
    browser.open(HEADLINE, 1360, 1500)
    browser.until(lambda: browser.image_sizes("img"))  # the summary
    browser.picture("time-series")
    for tag, value in {"known_broken": known.broken, "unseen_broken": unseen.broken}.items():
        browser.open(f"?tagFilter=%5Erepair%2F{tag}%24&smoothing=0#timeseries")
        # Under the chart stand run, value and step.
        browser.until(lambda: RUN in _behind_the_heads(browser))
        assert _behind_the_heads(browser) == [RUN, f"{value:,}"], tag


@pytest.mark.skipif(SCREENSHOTS is not None, reason="the quickstart records no history")
def test_a_history_has_its_curves(browser: Browser, log_dir: Path) -> None:
    record = TrainingRecord.read(log_dir / "version_0" / "history")
    assert len(record.points) == 15
    learned = int(record.splits["val"].passed[-1].sum())
    assert learned > 100
    browser.open("?tagFilter=%5Etraining%2Fval%2Flearned%24&smoothing=0#timeseries")
    browser.until(lambda: "version_0" in _behind_the_heads(browser))
    assert _behind_the_heads(browser) == ["version_0", f"{learned}"]
    browser.open("?tagFilter=%5Etraining_figures#timeseries", 1360, 1000)
    browser.shows("training_figures", "/val, by class")
    assert min(browser.until(lambda: browser.image_sizes("img"))[0]) > 100


def _behind_the_heads(browser: Browser) -> list[str]:
    texts = browser.texts()
    start = texts.index("Relative") + 1 if "Relative" in texts else len(texts)
    return texts[start : start + 2]


def test_scalars_and_histograms_have_their_tags(browser: Browser) -> None:
    browser.open("#scalars")
    browser.shows("repair/accepted", "repair/known_broken", "repair/unseen_broken")
    browser.picture("scalars")
    browser.open("#histograms")
    browser.shows("repair_weights/change")
    browser.until(lambda: browser.elements(".histogram path"))
    browser.picture("histograms")


def test_images_have_loaded(browser: Browser) -> None:
    browser.open("#images", 1360, 1000)
    browser.shows("repair/Summary", "repair_figures", "repair_samples")
    browser.until(lambda: len(browser.image_sizes("img")) >= 3)
    browser.picture("images")
    browser.open("#images&tagFilter=repair_samples", 1360, 1000)
    browser.shows("repair_samples/broken in test")
    assert min(browser.until(lambda: browser.image_sizes("img"))[0]) > 100
    if SCREENSHOTS is not None:
        (real_size,) = [one for one in browser.elements("paper-checkbox") if "actual image size" in one.text]
        real_size.click()
    browser.picture("images-samples")


def test_text_is_the_report(browser: Browser, report: RepairReport) -> None:
    known, unseen = counts(report)
    browser.open("#text", 1360, 1000)
    browser.shows("Repaired", report.reason)
    texts = browser.texts()
    row = texts[texts.index("broken (was right, now wrong)") :]
    assert row[3:5] == [f"{known.broken:,}", f"{unseen.broken:,}"]  # of train, of repair, of both, of test
    browser.picture("text")


def test_hparams_have_a_row(browser: Browser, report: RepairReport) -> None:
    browser.open("#hparams", 2100, 500)
    browser.shows("repair/known_broken", "repair/unseen_broken")
    browser.until(lambda: browser.texts().count(report.target) >= 1)
    browser.picture("hparams")


def test_the_page_alone_shows_sorts_and_filters(browser: Browser, report: RepairReport, log_dir: Path) -> None:
    browser.open((log_dir / RUN / "report.html").as_uri(), 1360, 1000)
    driver = browser.driver
    assert browser.elements("h1")[0].text == "Repaired"
    assert report.reason in browser.elements("p")[0].text
    browser.picture("report-html")
    assert len(browser.elements("figure svg")) >= 4
    assert browser.image_sizes(".gallery img")[0] == (8, 8)
    flipped = [one for split in report.splits for one in split.flipped]
    n_broken = sum(one.flip == "broken" for one in flipped)
    (field,) = browser.elements('input[type="search"]')
    driver.execute_script("arguments[0].scrollIntoView()", field)
    field.send_keys("broken")
    (status,) = browser.elements('[role="status"]')
    assert status.text == f"{n_broken} of {len(flipped)}"
    field.clear()
    field.send_keys(" ")
    (head,) = [one for one in browser.elements("table.sortable th button") if one.text == "margin after"]
    head.click()
    assert head.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    script = """return [...document.querySelectorAll("table.sortable tbody tr")]
        .filter(row => !row.hidden).map(row => parseFloat(row.cells[7].textContent))"""
    margins = driver.execute_script(script)
    assert len(margins) == len(flipped)
    assert margins == sorted(margins)
    browser.picture("report-html-flips")
    assert browser.errors() == []
