"""A comparison as a picture: what each method repairs against what it breaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_nrl.baselines import BASELINES
from lightning_nrl.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from lightning_nrl.comparison.comparison import Comparison, Entry

__all__ = ["draw_comparison"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#000000", "#7F7F7F")
"""Okabe and Ito's colours, told apart by colour-blind readers too; the yellow is darker, to be read on white."""
INK, FAINT = "#333333", "#BBBBBB"
LINE = 13.0  # points from one label to the next
ROOM = 1.12  # of an axis beyond the largest count

Role = Literal["known", "unseen"]


def draw_comparison(comparison: Comparison) -> Any:
    """Known data on the left, unseen data on the right; baselines are dashed.

    A dot is a method's weights as it gave them, a ring the same scaled back until no known sample is broken. A method
    whose way between leads through networks that break more than all that is shown, such as one that was trained anew,
    has no line.

    Returns:
        A `matplotlib.figure.Figure`, made without touching the global state of pyplot.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            explain("`plot`: matplotlib is not installed.", "install it: pip install matplotlib")
        ) from error
    entries = [entry for entry in comparison.entries if entry.curve]
    figure = Figure(figsize=(11, 5), layout="constrained")
    roles: list[Role] = ["known"]
    if any(entry.curve[0].unseen.n for entry in entries):
        roles.append("unseen")
    for axes, role in zip(figure.subplots(1, len(roles), squeeze=False)[0], roles, strict=True):
        _panel(axes, role, entries)
    figure.suptitle(f"Repaired against broken, {comparison.targets:,} failures to repair", color=INK, fontsize=12)
    return figure


def _panel(axes: Any, role: Role, entries: Sequence[Entry]) -> None:
    curves = [_xy(entry, role) for entry in entries]
    right = ROOM * max([1, *(curve[-1][0] for curve in curves)])
    top = ROOM * max([1, *(y for curve in curves for x, y in curve if x <= right)])
    axes.plot([0, top], [0, top], color=FAINT, linewidth=0.8, zorder=0)
    ends = []
    for i, (entry, curve) in enumerate(zip(entries, curves, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        if all(x <= right for x, _ in curve):
            style = "--" if entry.method in BASELINES else "-"
            axes.plot(*zip(*curve, strict=True), color=colour, linestyle=style, linewidth=1.6)
        axes.plot(*curve[-1], "o", color=colour, markersize=6, clip_on=False, zorder=3)
        if entry.scaled is not None and 0 < entry.scaled.strength < 1:
            flips = getattr(entry.scaled, role)
            axes.plot(
                flips.broken,
                flips.repaired,
                "o",
                markerfacecolor="white",
                markeredgecolor=colour,
                markersize=6,
                clip_on=False,
                zorder=3,
            )
        ends.append((entry.method, colour, curve[-1]))
    axes.set_xlim(0, right)
    axes.set_ylim(0, top)
    axes.set_title(f"{role} samples", color=INK, fontsize=10, loc="left")
    axes.set_xlabel("broken (was right, now wrong)", color=INK)
    axes.set_ylabel("repaired (was wrong, now right)", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    _label(axes, ends, top)


def _label(axes: Any, ends: Sequence[tuple[str, str, tuple[int, int]]], top: float) -> None:
    """Names at the right of the panel, each led to the end of its curve, none over another."""
    from matplotlib.transforms import blended_transform_factory

    height = axes.figure.get_figheight() * 72 * 0.75  # about what the panel has of it, in points
    gap = LINE / height * top
    ordered = sorted(ends, key=lambda end: end[2][1])
    places = [y for _, _, (_, y) in ordered]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    over = max(0.0, places[-1] - top) if places else 0.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top - gap * (len(places) - 1 - i)) if over else places[i]
    margin = blended_transform_factory(axes.transAxes, axes.transData)
    for (name, colour, end), y in zip(ordered, places, strict=True):
        axes.annotate(
            name,
            xy=end,
            xytext=(1.03, y),
            textcoords=margin,
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5, "shrinkA": 1, "shrinkB": 4},
        )


def _xy(entry: Entry, role: Role) -> list[tuple[int, int]]:
    """Broken and repaired at rising strengths."""
    return [(getattr(point, role).broken, getattr(point, role).repaired) for point in entry.curve]
