"""The plot of a comparison: what each method repairs against what it breaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lightning_nrl.analysis.baselines import BASELINES
from lightning_nrl.analysis.comparison.comparison_result import Comparison, CurvePoint, Entry
from lightning_nrl.report._figures import INK, figure_of, new_figure

__all__ = ["COLOURS", "FAINT", "draw_comparison", "label_points"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#000000", "#7F7F7F", "#882255")
"""Okabe and Ito's colours, told apart by colour-blind readers too; the yellow is
darker, to be read on white, and Tol's wine is added."""
FAINT = "#BBBBBB"
LABEL_DISTANCE = 8.0  # points from the end of a curve to its name
LEGEND = (
    "Dot: as the method gave it; ring: scaled back to none known broken; dashed: a baseline; "
    "thin line: as many broken as repaired"
)
AXIS_LENGTH = 1.12  # of an axis beyond the largest count
LEADER_STYLE = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}

PlottedRole = Literal["known", "unseen"]
End = tuple[str, str, tuple[float, float]]
"""A name, such as a method's, its colour, and the point that it belongs to, such as where a curve ends."""
Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


@figure_of.register
def draw_comparison(comparison: Comparison) -> Any:
    """Known data on the left, unseen data on the right; baselines are dashed.

    A dot is a method's weights as it gave them, a ring the same scaled back until no known sample is broken. A method
    whose way between leads through networks that break more than all that is shown, such as one that was trained anew,
    has no line.
    """
    entries = [entry for entry in comparison.entries if entry.curve]
    figure = new_figure(11, 5)
    roles: list[PlottedRole] = ["known", "unseen"]
    roles = roles if any(entry.curve[0].unseen.n for entry in entries) else roles[:1]
    figure.suptitle(f"{comparison.targets:,} failures to repair\n{LEGEND}", color=INK, fontsize=10)
    panels = figure.subplots(1, len(roles), squeeze=False)[0]
    ends = [_panel(axes, role, entries) for axes, role in zip(panels, roles, strict=True)]
    for axes, own in zip(panels, ends, strict=True):
        label_points(axes, own)
    return figure


def label_points(axes: Any, ends: Sequence[End]) -> None:
    """Names beside points, moved up or down where one would lie over another or over a point; limits must be final."""
    from matplotlib.patheffects import withStroke

    figure, halo = axes.figure, withStroke(linewidth=2.5, foreground="white")
    figure.draw_without_rendering()  # the layout is made now, so that what is measured is what will be shown
    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    ends_at = [axes.transData.transform(end) for _, _, end in ends]
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in ends_at]
    for (name, colour, end), at in sorted(zip(ends, ends_at, strict=True), key=lambda pair: -pair[1][1]):
        text = axes.annotate(
            name, end, color=colour, fontsize=9, va="center", annotation_clip=False, path_effects=[halo]
        )
        size = text.get_window_extent(renderer)
        x, y = at[0] + LABEL_DISTANCE * scale, at[1]
        for place in _around(y, 0.5 * size.height):
            box = (x, place - size.height / 2, x + size.width, place + size.height / 2)
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        text.set_position(axes.transData.inverted().transform((x, place)))
        if abs(place - y) > size.height / 2:
            beside = axes.transData.inverted().transform((x, place))
            axes.annotate("", beside, end, arrowprops={**LEADER_STYLE, "color": colour}, annotation_clip=False)


def _panel(axes: Any, role: PlottedRole, entries: Sequence[Entry]) -> list[End]:
    curves = [[_xy(point, role) for point in entry.curve] for entry in entries]
    right = AXIS_LENGTH * max([1, *(curve[-1][0] for curve in curves)])
    top = AXIS_LENGTH * max([1, *(y for curve in curves for x, y in curve if x <= right)])
    axes.plot([0, top], [0, top], color=FAINT, linewidth=0.8, zorder=0)
    ends: list[End] = []
    for i, (entry, curve) in enumerate(zip(entries, curves, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        if all(x <= right for x, _ in curve):
            style = "--" if entry.method in BASELINES else "-"
            axes.plot(*zip(*curve, strict=True), color=colour, linestyle=style, linewidth=1.6)
        axes.plot(*curve[-1], "o", color=colour, markersize=6, clip_on=False, zorder=3)
        if entry.scaled is not None and 0 < entry.scaled.strength < 1:
            ring = {"markerfacecolor": "white", "markeredgecolor": colour, "markersize": 9}  # seen around a dot, too
            axes.plot(*_xy(entry.scaled, role), "o", **ring, clip_on=False, zorder=2.5)
        ends.append((entry.method, colour, curve[-1]))
    axes.set_xlim(-0.02 * right, right)  # what breaks nothing is beside the axis, not under it
    axes.set_ylim(0, top)
    axes.set_title(f"{role} samples", color=INK, fontsize=10, loc="left")
    axes.set_xlabel("broken (was right, now wrong)", color=INK)
    axes.set_ylabel("repaired (was wrong, now right)", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return ends


def _around(y: float, step: float) -> Iterator[float]:
    """Ever farther places, above and below by turns."""
    yield y
    for i in range(1, 60):
        yield y + i * step
        yield y - i * step


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _xy(point: CurvePoint, role: PlottedRole) -> tuple[int, int]:
    """Broken and repaired."""
    counts = point.known if role == "known" else point.unseen
    return counts.broken, counts.repaired
