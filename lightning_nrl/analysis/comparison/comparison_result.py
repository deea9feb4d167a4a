"""What several methods made of one problem, as data, JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_nrl.analysis.comparison.comparison_plot import draw_comparison
from lightning_nrl.analysis.comparison.comparison_tables import page_of_comparison
from lightning_nrl.errors import check_choice
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.report import Page, Report, installed_versions
from lightning_nrl.report._figures import Plotted

__all__ = ["Comparison", "CurvePoint", "Entry", "HeadToHead"]


@dataclass(frozen=True)
class CurvePoint:
    """A method's weights at one strength, counted by a forward pass of the deployed model.

    Attributes:
        strength: t of w0 + t (w - w0); 0 is the original, 1 what the method gave.
        targeted: failures to be repaired that pass.
        known: what became of all known samples.
        unseen: what became of samples that no method looked at.
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
    """What came of one method.

    Attributes:
        method: its name.
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

    def broken_at(self, repaired: float) -> float:
        """How many unseen samples break where so many are repaired, by straight lines between points of the curve.

        Where the curve is at that height more than once, the fewest; NaN where it never is.
        """
        ends = [(point.unseen.repaired, point.unseen.broken) for point in self.curve]
        found = [float(x) for y, x in ends if y == repaired]
        for (y, x), (y_next, x_next) in pairwise(ends):
            if min(y, y_next) < repaired < max(y, y_next):
                found.append(x + (x_next - x) * (repaired - y) / (y_next - y))
        return min(found, default=math.nan)


@dataclass(frozen=True)
class HeadToHead:
    """A method at one strength, and another method where that repairs as many unseen samples.

    Attributes:
        method: the first method.
        point: its weights at one strength.
        broken: unseen samples that the other breaks for as many repaired ones; NaN if it never repairs as many.
    """

    method: str
    point: CurvePoint
    broken: float

    @property
    def fewer(self) -> bool:
        """Whether the other breaks fewer."""
        return self.broken < self.point.unseen.broken


@dataclass(frozen=True)
class Comparison(Report, Plotted):
    """Several methods on one problem. `rich.print(comparison)` shows it as a table.

    Attributes:
        entries: one a method, in the order in which they ran.
        targets: failures that were to be repaired.
        target: which these are, in words.
        layer: what was to be changed, as it was asked for.
        seed: of everything random.
        versions: versions of the software by name.
    """

    entries: tuple[Entry, ...]
    targets: int
    target: str
    layer: str
    seed: int
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    def page(self, full: bool = False) -> Page:
        return page_of_comparison(self)

    def figure(self) -> Any:
        return draw_comparison(self)

    def __getitem__(self, method: str) -> Entry:
        """The entry of a method.

        Raises:
            ConfigurationError: it is not there; the nearest name is given.
        """
        found = {entry.method: entry for entry in self.entries}
        check_choice("method", method, tuple(found))
        return found[method]

    def head_to_head(self, method: str) -> tuple[HeadToHead, ...]:
        """A method beside every other one at each point of that one's curve, at equal unseen repaired."""
        own = self[method]
        return tuple(
            HeadToHead(entry.method, point, own.broken_at(point.unseen.repaired))
            for entry in self.entries
            if entry.method != method
            for point in entry.curve[1:]
        )

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
            (folder / f"comparison.{kind}").write_text(text, encoding="utf-8")
