"""Numbers of a diagnosis in words."""

from __future__ import annotations

import math

__all__ = ["about", "part"]


def part(share: float) -> str:
    """A share as a percentage; `-` where it is not known, `none` where it is infinite."""
    if not math.isfinite(share):
        return "-" if math.isnan(share) else "none"
    digits = 0 if share >= 0.0995 or not share else 1 if share >= 0.00995 else 2
    return f"{share:.{digits}%}"


def about(seconds: float) -> str:
    """A time in words that do not claim more than is known."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"
