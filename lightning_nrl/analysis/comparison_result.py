"""The result of a comparison as data, a page, a table and a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_nrl._utils.atomic_files import write_text
from lightning_nrl.analysis.baselines import BASELINES
from lightning_nrl.errors import check_choice
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.report import Report, installed_versions
from lightning_nrl.report._figures import INK, PALETTE, Plotted, label_axes, literal, new_figure
from lightning_nrl.report._formatting import count, plural
from lightning_nrl.report.page import Block, Facts, Heading, Page, Row, Table, Text


@dataclass(frozen=True)
class CurvePoint:
    """Counts of a method's weights at one strength t, w0 + t (w - w0), by a forward pass of the deployed model.

    `targeted` are failures to be repaired that pass; no method looked at `unseen` samples.
    """

    strength: float
    targeted: int
    known: FlipCounts
    unseen: FlipCounts

    @property
    def gain(self) -> float:
        """The change of accuracy on unseen data in points, that is hundredths; NaN without such data."""
        return 100 * (self.unseen.repaired - self.unseen.broken) / self.unseen.n if self.unseen.n else math.nan


@dataclass(frozen=True)
class Entry:
    """The result of one method.

    Attributes:
        seconds: wall time until it gave its weights.
        curve: its weights at rising strengths from 0, the last as it gave them; empty if it gave none.
        scaled: the weights at the largest strength that was found to break no known sample, as they are if they break
            none; None if the method gave none.
        scaling: seconds that the search for this strength took.
        note: what the method says of its result, or why there is none.
    """

    method: str
    seconds: float
    curve: tuple[CurvePoint, ...] = ()
    scaled: CurvePoint | None = None
    scaling: float = 0.0
    note: str = ""

    @property
    def given(self) -> CurvePoint | None:
        """The weights as the method gave them."""
        return self.curve[-1] if self.curve else None


@dataclass(frozen=True)
class Comparison(Report, Plotted):
    """Several methods on one problem. `rich.print(comparison)` shows it as a table.

    Attributes:
        entries: one a method, in the order in which they ran.
        targets: failures that were to be repaired.
        target: which these are, in words.
    """

    entries: tuple[Entry, ...]
    targets: int
    target: str
    layer: str
    seed: int
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    def page(self, full: bool = False) -> Page:
        return _page(self)

    def figure(self) -> Any:
        return _figure(self)

    def __getitem__(self, method: str) -> Entry:
        """The entry of a method; a `ConfigurationError` names the nearest one if it is not there."""
        found = {entry.method: entry for entry in self.entries}
        check_choice("method", method, tuple(found))
        return found[method]

    def to_csv(self) -> str:
        """A line for every point of every curve, and one for the weights scaled back."""
        out = io.StringIO()
        names = ("repaired", "broken", "n")
        columns = ("method", "weights", "strength", "seconds", "targeted")
        table = csv.writer(out, lineterminator="\n")
        table.writerow((*columns, *(f"{role}_{name}" for role in ("known", "unseen") for name in names), "gain"))
        for entry in self.entries:
            lines = [("given" if point is entry.given else "curve", entry.seconds, point) for point in entry.curve]
            if entry.scaled is not None:
                lines.append(("scaled", entry.seconds + entry.scaling, entry.scaled))
            for kind, seconds, point in lines:
                counts = (getattr(flips, name) for flips in (point.known, point.unseen) for name in names)
                start = (entry.method, kind, f"{point.strength:g}", f"{seconds:.2f}", point.targeted)
                table.writerow((*start, *counts, f"{point.gain:.3f}"))
        return out.getvalue()

    def save(self, folder: str | Path) -> None:
        """Writes `comparison.json`, `comparison.csv` and `comparison.md` to a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for kind, text in (("json", self.to_json()), ("csv", self.to_csv()), ("md", self.to_markdown())):
            write_text(folder / f"comparison.{kind}", text)


SCALED_NOTE = "Scaled to t: the weights w0 + t (w - w0) at the largest t found to break no known sample."


def _page(comparison: Comparison) -> Page:
    shown = [entry for entry in comparison.entries if entry.curve]
    blocks: list[Block] = [Heading("Comparison", 1), Text(_summary(comparison, shown))]
    if shown:
        blocks.append(_table(comparison, shown))
        if any(_is_scaled(entry) for entry in shown):
            blocks.append(Text(SCALED_NOTE))
    left_out = tuple((entry.method, entry.note) for entry in comparison.entries if not entry.curve)
    if left_out:
        blocks += [Heading("Left out"), Facts(left_out)]
    facts = (("target", comparison.target), ("layer", comparison.layer), ("seed", str(comparison.seed)))
    return Page((*blocks, Facts(facts)))


def _summary(comparison: Comparison, shown: Sequence[Entry]) -> str:
    text = f"{plural(comparison.targets, 'failure')} to repair"
    if not shown:
        return f"{text}; no method gave new weights."
    first = shown[0].curve[0]
    text += f", {first.known.passed:,} of {first.known.n:,} known samples right before"
    if first.unseen.n:
        text += f", {first.unseen.passed:,} of {first.unseen.n:,} unseen ones"
    return f"{text}."


def _table(comparison: Comparison, shown: Sequence[Entry]) -> Table:
    """One line a method, and where it breaks known samples a second one for its weights scaled back until none is."""
    with_unseen = _has_unseen(shown)
    columns = [("repaired", f"of {comparison.targets:,}"), ("repaired", "known"), ("broken", "known")]
    if with_unseen:
        columns += [("repaired", "unseen"), ("broken", "unseen"), ("accuracy", "points")]

    def row(label: str, seconds: float, point: CurvePoint) -> Row:
        texts = list(map(count, (point.targeted, point.known.repaired, point.known.broken)))
        if with_unseen:
            texts += [count(point.unseen.repaired), count(point.unseen.broken), f"{point.gain:+.1f}"]
        return Row(label, (*texts, f"{seconds:,.1f}"))

    rows = []
    for entry in shown:
        rows.append(row(entry.method, entry.seconds, entry.curve[-1]))
        if entry.scaled is not None and _is_scaled(entry):
            label = f"  scaled to {entry.scaled.strength:.2f}"
            rows.append(row(label, entry.seconds + entry.scaling, entry.scaled))
    return Table((*columns, ("time", "s")), tuple(rows))


def _is_scaled(entry: Entry) -> bool:
    return entry.scaled is not None and entry.scaled.strength < 1


def _has_unseen(shown: Sequence[Entry]) -> bool:
    return any(entry.curve[0].unseen.n for entry in shown)


FAINT = "#BBBBBB"
LEGEND = (
    "Dot: as the method gave it; ring: scaled back to none known broken; dashed: a baseline; "
    "thin line: as many broken as repaired"
)
AXIS_LENGTH = 1.12  # of an axis beyond the largest count


def _figure(comparison: Comparison) -> Any:
    """Draws repaired against broken, known data on the left, unseen data on the right.

    A method whose way between leads through networks that break more than all that is shown, such as one that was
    trained anew, has no line.
    """
    shown = [entry for entry in comparison.entries if entry.curve]
    figure = new_figure(11, 5)
    roles = ("known", "unseen") if _has_unseen(shown) else ("known",)
    figure.suptitle(f"{comparison.targets:,} failures to repair\n{LEGEND}", color=INK, fontsize=10)
    panels = figure.subplots(1, len(roles), squeeze=False)[0]
    for axes, role in zip(panels, roles, strict=True):
        _panel(axes, role, shown)
    if shown:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _panel(axes: Any, role: str, entries: Sequence[Entry]) -> None:
    def place(point: CurvePoint) -> tuple[int, int]:
        counts: FlipCounts = getattr(point, role)
        return counts.broken, counts.repaired

    curves = [[place(point) for point in entry.curve] for entry in entries]
    right = AXIS_LENGTH * max([1, *(curve[-1][0] for curve in curves)])
    top = AXIS_LENGTH * max([1, *(y for curve in curves for x, y in curve if x <= right)])
    axes.plot([0, top], [0, top], color=FAINT, linewidth=0.8, zorder=0)
    for i, (entry, curve) in enumerate(zip(entries, curves, strict=True)):
        colour = PALETTE[i % len(PALETTE)]
        if all(x <= right for x, _ in curve):
            style = "--" if entry.method in BASELINES else "-"
            axes.plot(*zip(*curve, strict=True), color=colour, linestyle=style, linewidth=1.6)
        axes.plot(*curve[-1], "o", color=colour, markersize=6, clip_on=False, zorder=3, label=literal(entry.method))
        if entry.scaled is not None and 0 < entry.scaled.strength < 1:
            ring = {"markerfacecolor": "white", "markeredgecolor": colour, "markersize": 9}  # seen around a dot, too
            axes.plot(*place(entry.scaled), "o", **ring, clip_on=False, zorder=2.5)
    axes.set_xlim(-0.02 * right, right)  # what breaks nothing is beside the axis, not under it
    axes.set_ylim(0, top)
    axes.set_title(f"{role} samples", color=INK, fontsize=10, loc="left")
    label_axes(axes, "broken (was right, now wrong)", "repaired (was wrong, now right)")
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
