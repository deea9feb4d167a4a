"""Numbers, shares, times and lists as text: one way each, for all pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LISTED_IDS = 20


def count(n: int) -> str:
    """A whole number, its thousands set apart."""
    return f"{n:,}"


def number(x: float) -> str:
    """Four significant digits; `-` where undefined."""
    return f"{x:.4g}" if math.isfinite(x) else "-"


def percent(share: float) -> str:
    """Two decimals, never rounded to none or to all; `-` where undefined."""
    if not math.isfinite(share):
        return "-"
    if 0 < share < 0.00005:
        return "< 0.01 %"
    return "> 99.99 %" if 0.99995 <= share < 1 else f"{100 * share:.2f} %"


def rough_percent(share: float) -> str:
    """A share that is not known better than to two digits; `-` where unknown, `none` where infinite."""
    if not math.isfinite(share):
        return "-" if math.isnan(share) else "none"
    digits = 0 if share >= 0.0995 or not share else 1 if share >= 0.00995 else 2
    return f"{share:.{digits}%}"


def rough_time(seconds: float) -> str:
    """A time in words."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


def plural(n: int, noun: str) -> str:
    """Formats a number with its noun, such as `1 sample` and `2 samples`."""
    return f"{n:,} {noun}{'s' if n != 1 else ''}"


def list_ids(ids: Sequence[int], where: str) -> str:
    """Positions of samples, the first few, and where all can be read; `none` if there is none."""
    more = f" ... all {len(ids):,} in {where}" if ids[LISTED_IDS:] else ""
    return ", ".join(map(str, ids[:LISTED_IDS])) + more or "none"


def setting(value: Any) -> str:
    """An argument; those in groups as `name=value`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={setting(item)}" for key, item in value.items())
    return str(value)


def from_here(path: str) -> str:
    """The path as one would type it in the working directory: relative if it lies below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def sentence(text: str) -> str:
    """The text with a capital first and a full stop last."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
