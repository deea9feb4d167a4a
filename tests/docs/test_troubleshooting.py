"""Messages that docs/troubleshooting.md explains are messages of the code."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from repository import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [
    *re.findall(r"^### (.+)$", PAGE, re.MULTILINE),
    *re.findall(r"^\| (`` .+? ``) \|", PAGE, re.MULTILINE),
]
MESSAGES = [message.strip() for line in QUOTED for message in re.findall(r"``(.+?)``", line)]


@cache
def spoken() -> str:
    """All text in the code, what is computed in it left out."""
    parts = []
    for path in (ROOT / "lightning_nrl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                values = [
                    part.value if isinstance(part, ast.Constant) else "\0" for part in node.values
                ]
                parts.append("".join(map(str, values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    return "\n".join(parts)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_code(message: str) -> None:
    assert len(message) >= 15
    pattern = r"[^\n]*?".join(
        re.escape(part.strip()) for part in message.split("...") if part.strip()
    )
    assert re.search(pattern, spoken()), message
