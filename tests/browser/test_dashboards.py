"""What TensorBoard's own dashboards, and report.html, show of a repair in Chromium."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser

HEADLINE = "?tagFilter=%5Erepair%2F&smoothing=0#timeseries"
"""The address that docs/tensorboard.md gives."""
RUN = "version_0/repair"


@pytest.mark.parametrize(
    ("place", "texts", "waits_for", "picture"),
    [
        (HEADLINE, ["/Summary", RUN], "img", "time-series"),
        (
            "#scalars",
            ["repair/accepted", "repair/known_broken", "repair/unseen_broken"],
            "",
            "scalars",
        ),
        ("#histograms", ["repair_weights/change"], ".histogram path", "histograms"),
        ("#images", ["repair/Summary", "repair_figures", "repair_samples"], "img", "images"),
        (
            "#images&tagFilter=repair_samples",
            ["repair_samples/broken in test"],
            "img",
            "images-samples",
        ),
        ("#text", ["Repaired", "broken (was right, now wrong)"], "", "text"),
        ("#hparams", ["repair/known_broken", "repair/unseen_broken"], "", "hparams"),
    ],
)
def test_a_dashboard_shows_the_repair(browser, place, texts, waits_for, picture):
    browser.open(place, 2100 if place == "#hparams" else 1360, 1000)
    browser.shows(*texts)
    if waits_for:
        browser.until(lambda: browser.elements(waits_for))
    if waits_for == "img":
        assert min(browser.until(lambda: browser.image_sizes("img"))[0]) > 100
    browser.picture(picture)


def test_the_page_alone_shows_sorts_and_filters(browser, report, log_dir):
    browser.open((log_dir / RUN / "report.html").as_uri(), 1360, 1000)
    driver = browser.driver
    assert browser.elements("h1")[0].text == report.verdict.headline
    assert report.reason.replace("`", "") in browser.elements("p")[0].text
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
    (head,) = [
        one for one in browser.elements("table.sortable th button") if one.text == "margin after"
    ]
    head.click()
    assert head.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    script = """return [...document.querySelectorAll("table.sortable tbody tr")]
        .filter(row => !row.hidden).map(row => parseFloat(row.cells[7].textContent))"""
    margins = driver.execute_script(script)
    assert len(margins) == len(flipped)
    assert margins == sorted(margins)
    browser.picture("report-html-flips")
    # Figures are drawn on white, which must not stay white on a dark page.
    dark = "return getComputedStyle(document.querySelector('figure svg')).filter"
    shown = [driver.execute_script(dark)]
    media = [{"name": "prefers-color-scheme", "value": "dark"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    shown.append(driver.execute_script(dark))
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert shown == ["none", "invert(0.914) hue-rotate(180deg)"]
    assert browser.errors() == []
