"""Formats numbers, shares, times and lists as text, in the same way on all pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

LISTED_IDS = 20  # a line or two of a page


def number(x: float) -> str:
    """Formats a number with four significant digits, or as `-` if it is NaN or infinite."""
    if not math.isfinite(x):
        return "-"
    return f"{x:.4g}"


def percent(share: float) -> str:
    """Formats a share in percent with two decimals, but never rounds to 0 % or 100 %.

    NaN and infinity become `-`.
    """
    if not math.isfinite(share):
        return "-"
    if 0 < share < 0.00005:
        return "< 0.01 %"
    if 0.99995 <= share < 1:
        return "> 99.99 %"
    return f"{100 * share:.2f} %"


def exact_percent(share: float) -> str:
    """Formats a share so that `read_number` reads the same share."""
    return f"{100 * share:.12g}%"


def rough_percent(share: float) -> str:
    """Formats an estimated share in percent with about two digits.

    NaN becomes `-`, infinity becomes `none`.
    """
    if math.isnan(share):
        return "-"
    if math.isinf(share):
        return "none"
    if share >= 0.0995 or not share:
        return f"{share:.0%}"
    if share >= 0.00995:
        return f"{share:.1%}"
    return f"{share:.2%}"


def rough_time(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 100:
        return f"about {seconds:.0f} s"
    if seconds < 6000:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"


def plural(n: int, noun: str) -> str:
    if n != 1:
        noun += "s"
    return f"{n:,} {noun}"


def list_ids(ids: Sequence[int | str], where: str) -> str:
    """Lists the first ids and, if some are left out, says that all are in `where`."""
    if not ids:
        return "none"
    text = ", ".join(map(str, ids[:LISTED_IDS]))
    if len(ids) > LISTED_IDS:
        text += f" ... all {len(ids):,} in {where}"
    return text


def titled(position: int, name: str) -> str:
    """Returns the position of a sample, with its name if it has one: `17 (cat.png)`."""
    return f"{position} ({name})" if name else str(position)


def format_setting(value: object) -> str:
    """Formats the value of a setting. A mapping becomes `name=value` pairs."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={format_setting(item)}" for key, item in value.items())
    return str(value)


def relative_to_cwd(path: str) -> str:
    """Returns a path below the working directory relative to it, and any other path unchanged."""
    if Path(path).is_relative_to(Path.cwd()):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def sentence(text: str) -> str:
    """Capitalizes the first letter, and adds a full stop if the text has no end mark."""
    text = text.strip()
    if not text.endswith((".", "!", "?")):
        text += "."
    return text[:1].upper() + text[1:]


def writable(text: str) -> str:
    """Escapes what no file can hold: parts that are no UTF-8, as in names of files."""
    return text.encode(errors="backslashreplace").decode()
