"""A comparison as a page: one table, and what it does not say by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_nrl.report._formatting import count, plural
from lightning_nrl.report.page import Block, Facts, Heading, Page, Row, Table, Text

if TYPE_CHECKING:
    from lightning_nrl.analysis.comparison.comparison_result import Comparison, CurvePoint, Entry

__all__ = ["page_of_comparison"]

SCALED_NOTE = "Scaled to t: the weights w0 + t (w - w0) at the largest t found to break no known sample."


def page_of_comparison(comparison: Comparison) -> Page:
    """One line a method, and where it breaks known samples a second one for its weights scaled back until none is."""
    shown = [entry for entry in comparison.entries if entry.curve]
    blocks: list[Block] = [Heading("Comparison", 1), Text(_summary(comparison))]
    if shown:
        blocks.append(_table(comparison, shown))
        if any(len(_lines(entry)) > 1 for entry in shown):
            blocks.append(Text(SCALED_NOTE))
    left_out = tuple((entry.method, entry.note) for entry in comparison.entries if not entry.curve)
    if left_out:
        blocks += [Heading("Left out"), Facts(left_out)]
    facts = (("target", comparison.target), ("layer", comparison.layer), ("seed", str(comparison.seed)))
    return Page((*blocks, Facts(facts)))


def _summary(comparison: Comparison) -> str:
    text = f"{plural(comparison.targets, 'failure')} to repair"
    first = next((entry.curve[0] for entry in comparison.entries if entry.curve), None)
    if first is None:
        return f"{text}; no method gave new weights."
    text += f", {first.known.passed:,} of {first.known.n:,} known samples right before"
    if first.unseen.n:
        text += f", {first.unseen.passed:,} of {first.unseen.n:,} unseen ones"
    return f"{text}."


def _table(comparison: Comparison, entries: list[Entry]) -> Table:
    with_unseen = any(entry.curve[0].unseen.n for entry in entries)
    columns = [("repaired", f"of {comparison.targets:,}"), ("repaired", "known"), ("broken", "known")]
    if with_unseen:
        columns += [("repaired", "unseen"), ("broken", "unseen"), ("accuracy", "points")]
    rows = []
    for entry in entries:
        for label, seconds, point in _lines(entry):
            texts = list(map(count, (point.targeted, point.known.repaired, point.known.broken)))
            if with_unseen:
                texts += [count(point.unseen.repaired), count(point.unseen.broken), f"{point.gain:+.1f}"]
            rows.append(Row(label, (*texts, f"{seconds:,.1f}")))
    return Table((*columns, ("time", "s")), tuple(rows))


def _lines(entry: Entry) -> list[tuple[str, float, CurvePoint]]:
    given, scaled = entry.curve[-1], entry.scaled
    lines = [(entry.method, entry.seconds, given)]
    if scaled is not None and scaled.strength < 1:
        lines.append((f"  scaled to {scaled.strength:.2f}", entry.seconds + entry.scaling, scaled))
    return lines
