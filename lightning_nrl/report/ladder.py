"""The rungs of the default's ladder and the price of the guarantee, as tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nrl.evaluation.flips import TargetCounts
from lightning_nrl.report._formatting import count, percent
from lightning_nrl.report.page import Row, Table
from lightning_nrl.report.run_records import PricePoint, Rung

__all__ = ["estimate_text", "price_table", "price_text", "rungs_table"]

NO_ESTIMATE = "-"


def rungs_table(rungs: Sequence[Rung]) -> Table:
    """What each rung repairs, breaks and changes; of held-out samples what the same procedure did without them."""
    columns = (
        ("repaired", "of the target"),
        ("repaired", "known"),
        ("broken", "known"),
        ("repaired", "held out"),
        ("broken", "held out"),
        ("weights", "changed"),
        ("seconds", ""),
    )
    rows = []
    for rung in rungs:
        known = (rung.repaired_in_target, rung.repaired, rung.broken)
        cells = (*map(count, known), *_held_out(rung.held_out), count(rung.weights_changed), f"{rung.seconds:,.1f}")
        rows.append(Row(rung.name + ", taken" * rung.taken, cells, "gain" if rung.taken else ""))
    return Table(columns, tuple(rows))


def price_table(price: Sequence[PricePoint]) -> Table:
    """The most that was repaired, by how many known passed samples may break."""
    columns = (
        ("broken", "known"),
        ("repaired", "of the target"),
        ("repaired", "known"),
        ("repaired", "held out"),
        ("broken", "held out"),
    )
    rows = [
        Row(
            _level(point.allowed),
            (*map(count, (point.broken, point.repaired_in_target, point.repaired)), *_held_out(point.held_out)),
        )
        for point in price
    ]
    return Table(columns, tuple(rows))


def price_text(price: Sequence[PricePoint]) -> str:
    """What it costs here that no known sample may break, in a sentence; empty where that is not known."""
    if not price or price[0].allowed:
        return ""
    none, most = price[0], max(price, key=lambda point: (point.repaired_in_target, -point.broken))
    if most.repaired_in_target <= none.repaired_in_target:
        return "nothing: no more targets are repaired where known samples may break"
    repaired = f"{count(most.repaired_in_target)} targets would be repaired instead of {count(none.repaired_in_target)}"
    return f"{repaired} if {count(most.broken)} known samples might break"


def estimate_text(held_out: TargetCounts | None) -> str:
    """What is to be expected of unseen data like the held-out samples; empty without any."""
    if held_out is None:
        return ""
    repaired = f"{count(held_out.repaired)} of {count(held_out.repaired + held_out.failing)} failures repaired"
    broken = f"{count(held_out.broken)} of {count(held_out.passed)} passed samples broken"
    points = f"{100 * (held_out.accuracy_after - held_out.accuracy_before):+.1f} points"
    return f"{repaired}, {broken}, {points}, of known samples that were held out"


def _held_out(counts: TargetCounts | None) -> tuple[str, str]:
    return (NO_ESTIMATE, NO_ESTIMATE) if counts is None else (count(counts.repaired), count(counts.broken))


def _level(allowed: float) -> str:
    if not allowed:
        return "none may break"
    return "any may break" if allowed == 1 else f"{percent(allowed)} may break"
