"""The plot of a comparison: what each method repairs against what it breaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_nrl.analysis.baselines import BASELINES
from lightning_nrl.report._figures import INK, PALETTE, label_axes, literal, new_figure

if TYPE_CHECKING:
    from lightning_nrl.analysis.comparison import Comparison, CurvePoint, Entry


FAINT = "#BBBBBB"
LEGEND = (
    "Dot: as the method gave it; ring: scaled back to none known broken; dashed: a baseline; "
    "thin line: as many broken as repaired"
)
AXIS_LENGTH = 1.12  # of an axis beyond the largest count

PlottedRole = Literal["known", "unseen"]


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
    for axes, role in zip(panels, roles, strict=True):
        _panel(axes, role, entries)
    if entries:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _panel(axes: Any, role: PlottedRole, entries: Sequence[Entry]) -> None:
    curves = [[_xy(point, role) for point in entry.curve] for entry in entries]
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
            axes.plot(*_xy(entry.scaled, role), "o", **ring, clip_on=False, zorder=2.5)
    axes.set_xlim(-0.02 * right, right)  # what breaks nothing is beside the axis, not under it
    axes.set_ylim(0, top)
    axes.set_title(f"{role} samples", color=INK, fontsize=10, loc="left")
    label_axes(axes, "broken (was right, now wrong)", "repaired (was wrong, now right)")
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)


def _xy(point: CurvePoint, role: PlottedRole) -> tuple[int, int]:
    """Broken and repaired."""
    counts = point.known if role == "known" else point.unseen
    return counts.broken, counts.repaired
