"""The pages of the docs, and the blocks of code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / ".github" / "CONTRIBUTING.md",
    ROOT / ".github" / "SECURITY.md",
]
FENCE = re.compile(
    r"(?:^[ ]*<!-- (?P<mark>[^>]*?) -->\n(?:[ ]*\n)?)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    code: str
    mark: str = ""
    """What the comment in front of it says, such as `not run: why`."""
    printed: str | None = None
    """Of Python: what follows as `<!-- printed -->`, its output to the letter."""

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def runs(self) -> bool:
        return not self.mark.startswith("not run")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(page, line, match["language"], code, match["mark"] or ""))
    return found


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """Those of a language, in order; Python's with what they print."""
    found = fences(page)
    for place, block in enumerate(found):
        if block.language in languages:
            after = found[place + 1] if place + 1 < len(found) else None
            printed = after.code if after is not None and after.mark == "printed" else None
            yield Block(block.page, block.line, block.language, block.code, block.mark, printed)
