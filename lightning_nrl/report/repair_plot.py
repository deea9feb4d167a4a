"""Figures of a repair: margins, confusions, the path of the patch and the course of the search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from textwrap import wrap
from typing import Any

from lightning_nrl.report._figures import INK, dress, figure_of, literal, new_figure
from lightning_nrl.report.confusion_plot import MATRIX_CLASSES, changed_classes, draw_confusion_change
from lightning_nrl.report.repair_report import RepairReport
from lightning_nrl.report.sample_tables import confusion_changes
from lightning_nrl.report.sample_views import SampleView
from lightning_nrl.report.splits import ROLES, SplitReport, pool

__all__ = ["draw_repair", "gallery_figures", "repair_figures"]

BEFORE_COLOUR, AFTER_COLOUR = "#999999", "#0072B2"
REPAIRED_COLOUR, BROKEN_COLOUR = "#009E73", "#D55E00"
"""Okabe and Ito's colours, told apart by colour-blind readers too."""
PLOTTED_CONFUSIONS = 12
GALLERY_COLUMNS, GALLERY_CELL = 3, 1.6  # inches; loggers show galleries small
CAPTION_WIDTH, CAPTION_LINE = 24, 0.15  # characters, inches
PANEL_WIDTH, PANEL_HEIGHT = 5.6, 3.6  # inches

Draw = Callable[[Any], None]
"""Draws one panel on matplotlib axes."""


def repair_figures(report: RepairReport) -> dict[str, Any]:
    """Each panel as a `matplotlib.figure.Figure` of its own, by its title; those without data are left out.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figures = {}
    for title, draw in _panels(report).items():
        figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
        draw(figure.subplots())
        figures[title] = figure
    return figures


def gallery_figures(views: Sequence[SampleView]) -> dict[str, Any]:
    """Pictures of flipped samples with their captions, by flip and split; those shown as text are left out."""
    galleries: dict[str, list[SampleView]] = {}
    for view in views:
        if view.pixels is not None:
            galleries.setdefault(f"{view.flip} in {view.split}", []).append(view)
    return {title: _gallery(own) for title, own in galleries.items()}


def _gallery(views: Sequence[SampleView]) -> Any:
    captions = [wrap(view.caption, CAPTION_WIDTH) for view in views]
    caption_height = CAPTION_LINE * (max(map(len, captions)) + 0.5)
    n_columns = min(len(views), GALLERY_COLUMNS)
    n_rows = -(-len(views) // n_columns)
    height = (GALLERY_CELL + caption_height) * n_rows
    figure = new_figure(GALLERY_CELL * n_columns, height, layout=None)
    places = {"left": 0.01, "right": 0.99, "bottom": 0.01, "top": 1 - caption_height / height}
    gaps = {"wspace": 0.1, "hspace": caption_height / GALLERY_CELL}
    axes = figure.subplots(n_rows, n_columns, squeeze=False, gridspec_kw=places | gaps).flatten()
    for own in axes:
        own.set_axis_off()
    for own, view, caption in zip(axes, views, captions, strict=False):
        own.imshow(view.pixels, interpolation="nearest")
        own.set_title(literal("\n".join(caption)), color=INK, fontsize=8)
    return figure


@figure_of.register
def draw_repair(report: RepairReport) -> Any:
    """All panels in one figure, two a row."""
    panels = _panels(report)
    n_rows = max(1, -(-len(panels) // 2))
    figure = new_figure(2 * PANEL_WIDTH, n_rows * PANEL_HEIGHT)
    figure.suptitle(literal(f"{report.status.capitalize()}: {report.target}"), color=INK, fontsize=12)
    axes = figure.subplots(n_rows, 2, squeeze=False).flatten()
    for own, (title, draw) in zip(axes, panels.items(), strict=False):
        draw(own)
        own.set_title(title, color=INK, fontsize=10)
    for own in axes[len(panels) :]:
        own.set_axis_off()
    return figure


def _panels(report: RepairReport) -> Mapping[str, Draw]:
    panels: dict[str, Draw] = {}
    splits = report.candidate or report.splits
    for role in ROLES:
        own = [split for split in splits if split.role == role]
        if not own:
            continue
        together = pool(own)
        if together.margins is not None and together.n:
            panels[f"Margins of {role} data"] = _margins(together)
        if len(changed_classes(together.confusion)) > MATRIX_CLASSES:
            panels[f"Confusions that changed, {role} data"] = _confusions(together, report.class_name)
        elif confusion_changes(together.confusion):
            matrix = partial(draw_confusion_change, together.confusion, report.class_name)
            panels[f"Change of the confusion matrix, {role} data"] = matrix
    if len(report.strength) > 1:
        panels["How far to go, samples by strength"] = _strength(report)
    if report.search is not None and len(report.search.history.get("patched", ())) > 1:
        panels["Course of the search"] = _search(report)
    return panels


def _margins(split: SplitReport) -> Draw:
    histogram = split.margins
    assert histogram is not None

    def draw(axes: Any) -> None:
        axes.stairs(histogram.before, histogram.edges, fill=True, color=BEFORE_COLOUR, alpha=0.45, label="before")
        axes.stairs(histogram.after, histogram.edges, color=AFTER_COLOUR, linewidth=1.6, label="after")
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
        dress(axes, "margin: wrong below 0, right above", "samples")

    return draw


def _confusions(split: SplitReport, name: Callable[[int], str]) -> Draw:
    cells = confusion_changes(split.confusion)[:PLOTTED_CONFUSIONS][::-1]

    def draw(axes: Any) -> None:
        changes = [cell.after - cell.before for cell in cells]
        colours = [BROKEN_COLOUR if change > 0 else REPAIRED_COLOUR for change in changes]
        labels = [literal(f"{name(cell.label)} taken for {name(cell.prediction)}") for cell in cells]
        bars = axes.barh(range(len(cells)), changes, color=colours)
        axes.bar_label(bars, [f"{cell.before} -> {cell.after}" for cell in cells], padding=3, fontsize=8)
        axes.set_yticks(range(len(cells)), labels, fontsize=8)
        axes.axvline(0, color=INK, linewidth=1)
        axes.margins(x=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
        dress(axes, "wrong predictions, after less before", "")

    return draw


def _strength(report: RepairReport) -> Draw:
    points = sorted(report.strength, key=lambda point: point.strength)

    def draw(axes: Any) -> None:
        at = [0.0, *(point.strength for point in points)]
        axes.plot(at, [0, *(p.known.repaired for p in points)], "o-", color=REPAIRED_COLOUR, label="repaired")
        axes.plot(at, [0, *(p.known.broken for p in points)], "s--", color=BROKEN_COLOUR, label="broken")
        held = [(p.strength, p.calibration) for p in points if p.calibration is not None]
        if held:
            at = [0.0, *(strength for strength, _ in held)]
            for flip, colour in (("repaired", REPAIRED_COLOUR), ("broken", BROKEN_COLOUR)):
                counts = [0, *(getattr(flips, flip) for _, flips in held)]
                axes.plot(at, counts, ":", marker="x", color=colour, label=f"{flip}, calibration")
        if report.chosen_strength is not None:
            axes.axvline(report.chosen_strength, color=INK, linewidth=1, linestyle=":", label="chosen")
        _finish_curves(
            axes, "strength: 0 the original weights, 1 the patch", "known samples" if not held else "samples"
        )

    return draw


def _search(report: RepairReport) -> Draw:
    search = report.search
    assert search is not None
    repaired: Sequence[float] = search.history["patched"]
    intact = search.history.get("intact", ())

    def draw(axes: Any) -> None:
        axes.plot(repaired, color=REPAIRED_COLOUR, label="repaired by the best")
        if intact and search.n_passed is not None:
            broken = [search.n_passed - one for one in intact]
            axes.plot(broken, "--", color=BROKEN_COLOUR, label="broken by the best")
        _finish_curves(axes, "iteration", "scored samples")

    return draw


def _finish_curves(axes: Any, across: str, up: str) -> None:
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    dress(axes, across, up)
