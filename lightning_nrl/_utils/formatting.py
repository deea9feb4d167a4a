"""Formats numbers, shares, times and lists as text, in the same way on all pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LISTED_IDS = 20


def count(n: int) -> str:
    return f"{n:,}"


def number(x: float) -> str:
    """Formats a number with four significant digits, or as `-` if it is NaN or infinite."""
    return f"{x:.4g}" if math.isfinite(x) else "-"


def percent(share: float) -> str:
    """Formats a share in percent with two decimals, but never rounds to 0 % or 100 %. NaN and
    infinity become `-`.
    """
    if not math.isfinite(share):
        return "-"
    if 0 < share < 0.00005:
        return "< 0.01 %"
    return "> 99.99 %" if 0.99995 <= share < 1 else f"{100 * share:.2f} %"


def rough_percent(share: float) -> str:
    """Formats an estimated share in percent with about two digits. NaN becomes `-`, infinity
    becomes `none`.
    """
    if not math.isfinite(share):
        return "-" if math.isnan(share) else "none"
    digits = 0 if share >= 0.0995 or not share else 1 if share >= 0.00995 else 2
    return f"{share:.{digits}%}"


def rough_time(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' if n != 1 else ''}"


def list_ids(ids: Sequence[int], where: str) -> str:
    """Lists the first ids and, if some are left out, says that all are in `where`. An empty list
    becomes `none`.
    """
    more = f" ... all {len(ids):,} in {where}" if ids[LISTED_IDS:] else ""
    return ", ".join(map(str, ids[:LISTED_IDS])) + more or "none"


def format_setting(value: Any) -> str:
    """Formats the value of a setting. A mapping becomes `name=value` pairs."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={format_setting(item)}" for key, item in value.items())
    return str(value)


def relative_to_cwd(path: str) -> str:
    """Returns a path below the working directory relative to it, and any other path unchanged."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def sentence(text: str) -> str:
    """Capitalizes the first letter, and adds a full stop if the text has no end mark."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
