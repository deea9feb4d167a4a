"""The Repair tab of a live TensorBoard, as a reader sees and uses it in Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browsed_logs import HOSTILE, HOSTILE_NAME, N_FLIPS, write_copy, write_hostile
from live_tensorboard import SCREENSHOTS, Browser

from lightning_nrl.report.tables import confusion_changes

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def other_repairs(log_dir: Path) -> None:
    write_hostile(log_dir)
    write_copy(log_dir, "version_0/repair")


def click(element: Any) -> None:
    element.parent.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def open_tab(browser: Browser, name: str, height: int = 1000) -> None:
    browser.open("#lightning_nrl", 1360, height)
    (frame,) = browser.until(lambda: browser.elements("iframe"))
    browser.driver.switch_to.frame(frame)
    browser.until(lambda: browser.elements(".asked"))
    (button,) = browser.elements(f'[data-repair="{name}"]')
    if button.get_attribute("aria-pressed") != "true":
        click(button)
    shown = "return document.querySelector('.asked dd').textContent"
    browser.until(lambda: browser.driver.execute_script(shown) == name)


def rows(browser: Browser) -> list[list[str]]:
    script = """return [...document.querySelectorAll("table.flips tbody tr")]
        .map(row => [...row.cells].map(cell => cell.textContent))"""
    found = browser.driver.execute_script(script)
    return found


def count(browser: Browser) -> str:
    (status,) = browser.elements(".count")
    return str(status.text)


@pytest.mark.skipif(SCREENSHOTS is None, reason="no pictures are wanted")
def test_pictures_for_the_docs(browser):
    open_tab(browser, "version_0/repair", 1320)
    browser.until(lambda: browser.image_sizes("table.flips img"))
    browser.picture("repair-tab")
    browser.elements('.filters option[value="version_0/swarm"]')[0].click()
    browser.shows("alone right")
    click(max(browser.elements(".matrix button"), key=lambda one: one.text))
    browser.driver.execute_script("document.querySelector('.beside').scrollIntoView()")
    loaded = "return [...document.querySelectorAll('table.flips img')].every(one => one.complete)"
    browser.until(lambda: browser.driver.execute_script(loaded))
    browser.picture("repair-tab-pair")
    browser.elements("#strength-slider")[0].send_keys("\ue012")
    browser.driver.execute_script("document.querySelector('.replay').scrollIntoView()")
    browser.picture("repair-tab-sliders")


@pytest.mark.usefixtures("other_repairs")
def test_a_repair_is_judged_used_and_kept_apart_from_others(browser, report):
    open_tab(browser, "version_0/repair")
    known, unseen = report.pooled("known"), report.pooled("unseen")
    # The verdict and the bound stand at the top.
    assert browser.elements("h1")[0].text == report.verdict.headline
    assert (
        f"{unseen.repaired} repaired, {unseen.broken} broken"
        in browser.elements(".answers")[0].text
    )
    tiles = [" ".join(tile.text.split()) for tile in browser.elements(".tiles li")]
    assert tiles[0] == f"known samples broken 0 of {known.passed:,} that were right"
    assert tiles[1] == f"targets repaired {known.repaired_in_target} of {known.targeted}"
    assert (
        tiles[2]
        == f"unseen failures repaired {unseen.repaired} of {unseen.repaired + unseen.failing}"
    )
    assert tiles[3] == f"unseen samples broken {unseen.broken} of {unseen.passed} that were right"
    assert "with 95 % confidence at most" in browser.elements(".answers")[0].text
    names = [button.text for button in browser.elements("#repairs tbody button")]
    assert {"copy", HOSTILE_NAME, "version_0/repair"} <= set(names)

    # All flips, the broken ones first, with pictures that have loaded.
    flipped = [(split.split, one) for split in report.splits for one in split.flipped]
    n_broken = sum(one.flip == "broken" for _, one in flipped)
    assert count(browser).startswith(f"{len(flipped)} of {len(flipped)}")
    shown = rows(browser)
    assert [row[3] for row in shown[: n_broken + 1]] == ["broken"] * n_broken + ["repaired"]
    assert browser.until(lambda: browser.image_sizes("table.flips img"))[0] == (8, 8)

    # A pair of the confusions leaves its samples: here of the one that has changed most in unseen
    # data.
    pair = confusion_changes(unseen.confusion)[0]
    name = f"{pair.label} taken for {pair.prediction}: {pair.before} before, {pair.after} after"
    (number,) = browser.elements(f'.matrix button[aria-label="{name}"]')
    click(number)
    of_pair = [one for split, one in flipped if split == "test" and one.label == pair.label]
    expected = [
        one for one in of_pair if pair.prediction in (one.predicted_before, one.predicted_after)
    ]
    assert 0 < len(expected) < len(flipped)
    assert count(browser).startswith(f"{len(expected)} of {len(flipped)}")
    assert {(row[1], row[4]) for row in rows(browser)} == {("test", str(pair.label))}
    assert number.get_attribute("aria-pressed") == "true"
    click(browser.elements(".chip")[0])
    assert count(browser).startswith(f"{len(flipped)} of {len(flipped)}")
    assert number.get_attribute("aria-pressed") == "false"

    # Beside another repair each sample says what became of it there.
    (beside,) = [one for one in browser.elements(".filters label") if one.text.startswith("beside")]
    beside.find_element("css selector", f'option[value="{HOSTILE_NAME}"]').click()
    browser.shows("the repairs do not start from the same model and data")
    beside.find_element("css selector", 'option[value="copy"]').click()
    browser.shows("no difference shown; 0 samples right in version_0/repair alone, 1 in copy alone")
    assert [row[-1] for row in rows(browser)[:n_broken]] == ["kept"] + ["broken"] * (n_broken - 1)

    # Words filter, heads sort, both by keyboard.
    (field,) = browser.elements('.filters input[type="search"]')
    field.send_keys("broken test")
    assert count(browser) == f"{n_broken} of {len(flipped)}"
    field.clear()
    field.send_keys("repair", "ed")
    (head,) = [
        one
        for one in browser.elements("table.flips th button")
        if one.text.startswith("margin after")
    ]
    head.send_keys("\n")
    margins = [float(row[8]) for row in rows(browser)]
    assert len(margins) == 25
    assert margins == sorted(margins)

    # A picture is seen large, and Escape leads back to the table.
    thumbnail = browser.elements("table.flips .thumbnail")[0]
    click(thumbnail)
    (large,) = browser.until(lambda: browser.elements("dialog[open] img"))
    assert large.get_attribute("alt").startswith(("test", "train", "repair"))
    large.parent.switch_to.active_element.send_keys("\ue00c")
    browser.until(lambda: not browser.elements("dialog[open]"))
    assert browser.driver.switch_to.active_element == thumbnail

    # The strength and the search are stepped through by arrow keys.
    (strength,) = browser.elements("#strength-slider")
    strength.send_keys("\ue011")  # Home: the model as it was
    facts = browser.elements('[aria-labelledby="strength-title"] .facts')[0].text.split("\n")
    assert dict(zip(facts[::2], facts[1::2], strict=False))["known broken"] == "0"
    assert (
        dict(zip(facts[::2], facts[1::2], strict=False))["targets repaired"]
        == f"0 of {known.targeted}"
    )
    if report.search is not None:  # the quickstart's repair, of which pictures are taken, has none
        (search,) = browser.elements("#search-slider")
        search.send_keys("\ue011", "\ue014")  # Home, then right
        assert search.get_attribute("aria-valuetext") == "iteration 1"
        facts = browser.elements('[aria-labelledby="search-title"] .facts')[0].text.split("\n")
        assert facts[1] == f"{report.search.history['patched'][1]:.0f} of {report.search.n_failed}"
        (play,) = browser.elements(".replay .slider button")
        click(play)
        last = f"iteration {len(report.search.history['best']) - 1}"
        browser.until(
            lambda: search.get_attribute("aria-valuetext") == last and play.text == "Play"
        )
    assert browser.errors("lightning_nrl") == []


@pytest.mark.usefixtures("other_repairs")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_on_a_laptop_or_a_phone(browser, log_dir, width):
    driver = browser.driver
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    too_wide = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    tables = """
        return [...document.querySelectorAll(".beside .wide")]
            .map(table => [table.scrollWidth, table.clientWidth]);"""
    try:
        open_tab(browser, "copy")
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_script(
            "for (const one of document.querySelectorAll('details')) one.open = true"
        )
        pages = [driver.execute_script(too_wide)]
        if width > 1000:
            pages += driver.execute_script(tables)
        driver.switch_to.default_content()
        driver.get((log_dir / "version_0/repair/report.html").as_uri())
        pages.append(driver.execute_script(too_wide))
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert [needed for needed, _ in pages] == [there for _, there in pages]


@pytest.mark.usefixtures("other_repairs")
def test_ten_thousand_flips_are_paged_and_markup_in_names_is_text(browser):
    open_tab(browser, HOSTILE_NAME)
    assert count(browser) == f"{N_FLIPS:,} of {N_FLIPS:,}, 1 to 25 on this page"
    assert len(rows(browser)) == 25
    assert HOSTILE in rows(browser)[0]
    (field,) = browser.elements('.filters input[type="search"]')
    field.send_keys("night")
    assert count(browser).startswith("100 of 10,000")
    field.clear()
    browser.driver.execute_script(
        "for (const one of document.querySelectorAll('details')) one.open = true"
    )
    shown = "\n".join(browser.texts())
    assert shown.count(HOSTILE) > 20
    made = browser.driver.execute_script("""
        const own = [...document.querySelectorAll("img:not([src*='/sample?'])")];
        const foreign = document.querySelectorAll("b, script[src*=evil]");
        return [window.hacked ?? null, own.length, foreign.length];""")
    assert made == [None, 0, 0]
    assert browser.errors("lightning_nrl") == []


@pytest.mark.usefixtures("other_repairs")
def test_whoever_cannot_see_or_point_finds_every_control(browser):
    open_tab(browser, "version_0/repair")
    unnamed = browser.driver.execute_script("""
        const named = one =>
            one.getAttribute("aria-label") || one.labels?.length || one.textContent.trim();
        return [...document.querySelectorAll("button, input, select, summary")]
            .filter(one => one.checkVisibility() && !named(one))
            .map(one => one.outerHTML);""")
    assert unnamed == []
