"""What it costs that no known sample may break: the best of all that was counted, by how many may."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.report.run_records import PricePoint

__all__ = ["price_points"]

PRICE_LEVELS = (0.0, 0.001, 0.005, 0.01, 0.02, 1.0)
"""Shares of the known passed samples that might break."""


def price_points(tried: Iterable[tuple[TargetCounts, TargetCounts | None]]) -> tuple[PricePoint, ...]:
    """A point for each level; levels within which nothing was counted are left out.

    Args:
        tried: what some weights do to all known samples, and what the procedure that they are from does to held-out
            ones, if that was tried.
    """
    counted = list(tried)
    points = []
    for level in PRICE_LEVELS:
        within = [both for both in counted if both[0].broken <= level * both[0].passed]
        if within:
            known, held_out = max(within, key=lambda both: _worth(both[0]))
            point = PricePoint(level, known.broken, known.repaired_in_target, known.repaired, held_out)
            points.append(point)
    return tuple(points)


def _worth(counts: TargetCounts) -> tuple[int, int, int]:
    return counts.repaired_in_target, -counts.broken, counts.repaired
