"""Links of README and docs lead somewhere: to a file, and to a heading in it, on GitHub and on the
site alike.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from pages import PAGES, name_of
from repository import ROOT

HOME = "https://github.com/lightning-nrl/lightning_nrl/"
SITE = "https://lightning-nrl.github.io/lightning_nrl/"
LINK = re.compile(
    r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)"
    r"|<img[^>]* src=\"([^\"]+)\"|<a[^>]* href=\"([^\"]+)\""
)


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", without_blocks(page))


def without_blocks(page: Path) -> str:
    return re.sub(
        r"^([ ]*)```.*?^\1```[ ]*$",
        "",
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL | re.MULTILINE,
    )


def links(page: Path) -> list[str]:
    return [next(filter(None, found)) for found in LINK.findall(prose(page))]


@cache
def anchors(page: Path) -> set[str]:
    """Those that GitHub and the site make of a page's headings, where both agree."""
    text = without_blocks(page)
    found = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6} (.+?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        github = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        if github == site:
            found.add(github)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        where = f"{name_of(page)}: {link}"
        if link.startswith(HOME):
            path = re.match(r"(?:blob|tree)/main/([^#]+)", link.removeprefix(HOME))
            assert path is None or (ROOT / path[1]).exists(), where
            continue
        if link.startswith(SITE):
            inner = link.removeprefix(SITE).partition("#")[0].strip("/")
            assert not inner or (ROOT / "docs" / f"{inner}.md").exists(), where
            continue
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        leads_to = (page.parent / path).resolve() if path else page
        assert leads_to.exists(), where
        if page.is_relative_to(ROOT / "docs"):
            assert leads_to.is_relative_to(ROOT / "docs"), (
                f"{where} leads out of the site; give its address on GitHub"
            )
        if anchor:
            assert anchor in anchors(leads_to), where


def entries(part: object) -> list[str]:
    """The pages of a navigation."""
    if isinstance(part, str):
        return [part]
    values = part.values() if isinstance(part, dict) else part
    return [page for value in values for page in entries(value)]  # type: ignore[attr-defined]


def test_every_page_is_in_the_navigation_once() -> None:
    found = entries(yaml.safe_load((ROOT / ".mkdocs.yml").read_text())["nav"])
    pages = sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))
    assert sorted(found) == pages
