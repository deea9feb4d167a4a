"""Figures of a repair: its results, its search, changes of weights, samples and a summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from textwrap import shorten, wrap
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from lightning_nrl._utils.formatting import percent
from lightning_nrl.evaluation import FlipCounts
from lightning_nrl.records import (
    LocalizationReport,
    RepairRecord,
    StrengthPoint,
)
from lightning_nrl.records.splits import (
    ConfusionCell,
    MarginHistogram,
    Role,
    SplitReport,
    UpdateSplit,
    pool_by_role,
)
from lightning_nrl.report.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    RED,
    TONE_COLOURS,
    escape_dollars,
    label_axes,
    new_figure,
    style_axes,
)
from lightning_nrl.report.sample_views import SampleView, by_flip
from lightning_nrl.report.tables import ClassName, confusion_changes, confusion_title
from lightning_nrl.report.verdicts import verdict_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEARCH_TITLE = "Course of the search"
PLOTTED_CONFUSIONS = 12
MATRIX_CLASSES = 16  # larger matrices are not legible
CHANGE_COLOURS = "BrBG"  # brown is worse, teal better; safe for colour-blind readers
DARK = 0.7  # on cells darker than this share of the darkest shade, text is white
GALLERY_COLUMNS, GALLERY_CELL = 3, 1.6  # cell size in inches; loggers show galleries small
PICTURE_SHARE = 0.93  # of the width of a cell
CAPTION_WIDTH, CAPTION_LINE, CAPTION_GAP = 24, 0.15, 0.08  # characters, inches, inches
PANEL_WIDTH, PANEL_HEIGHT = 5.6, 3.6  # inches
SEARCH_WIDTH, SEARCH_ROW = 8.4, 2.7  # inches
PLOTTED_TENSORS, LABEL_CHARACTERS = 12, 34
# Largest picture of a tensor, in cells. In a larger tensor, a cell shows the largest change of
# several weights.
GRID_ROWS, GRID_COLUMNS = 128, 256
LABEL_WIDTH, COLUMN_WIDTH, ROW_HEIGHT = 2.1, 1.0, 0.3  # inches
HEAD_ROWS, TARGET_CHARACTERS = 3.2, 46
HARM_COLOUR, RULE_COLOUR, MUTED_COLOUR = TONE_COLOURS["bad"], "#CCCCCC", "#666666"

Draw = Callable[["Axes"], None]
"""Function that draws one panel."""


COUNTS_TITLE = "best so far: samples"
SEARCH_PANELS = {
    COUNTS_TITLE: {"patched": "repaired", "broken": "broken"},
    "fitness": {"best": "best so far", "mean": "mean of the swarm"},
    "best so far: mean loss": {"loss_failed": "on failed", "loss_passed": "on passed"},
    "diversity of the swarm": {"diversity": "diversity"},
}
"""Labels of the curves of `SearchHistory`, by title of the panel that shows them."""


def repair_figures(report: RepairRecord) -> dict[str, Figure]:
    """Draws a `matplotlib.figure.Figure` for each panel that has data, by title."""
    figures = {}
    for title, draw in _panels(report).items():
        figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
        draw(figure.subplots())
        figures[title] = figure
    return figures


def reviewer_figures(
    report: RepairRecord, changes: Mapping[str, Tensor] | None
) -> dict[str, Figure]:
    """Draws all figures for a reviewer, by title.

    These are the panels, the whole search, and `changes` of weights.
    """
    figures = repair_figures(report)
    search_panels = _search_panels(report)
    if search_panels:
        figures[SEARCH_TITLE] = _draw_together(search_panels, SEARCH_WIDTH, SEARCH_ROW)
    return figures | weight_figures(changes or {}, report.localization)


def gallery_figures(views: Sequence[SampleView]) -> dict[str, Figure]:
    """Draws pictures of flipped samples: a figure per split and kind of flip, by title.

    Skips samples shown as text.
    """
    galleries = by_flip([view for view in views if view.pixels is not None])
    return {title: _gallery(gallery) for title, gallery in galleries.items()}


def _gallery(views: Sequence[SampleView]) -> Figure:
    captions = [wrap(view.caption, CAPTION_WIDTH) for view in views]
    cell_height = GALLERY_CELL + CAPTION_LINE * (max(map(len, captions)) + 0.5)
    n_columns = min(len(views), GALLERY_COLUMNS)
    n_rows = -(-len(views) // n_columns)
    width, height = GALLERY_CELL * n_columns, cell_height * n_rows
    figure = new_figure(width, height, layout=None)
    # All pictures share one pair of axes, in inches from the top left. A pair per picture takes
    # many times longer.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for i, view in enumerate(views):
        row, column = divmod(i, n_columns)
        x = GALLERY_CELL * (column + 0.5)
        y = cell_height * (row + 1) - GALLERY_CELL / 2
        pixels = np.asarray(view.pixels)
        sides = np.array(pixels.shape[:2])
        up, across = PICTURE_SHARE * GALLERY_CELL / 2 * sides / max(sides)
        axes.imshow(
            pixels, interpolation="nearest", extent=(x - across, x + across, y + up, y - up)
        )
        text = escape_dollars("\n".join(captions[i]))
        axes.text(x, y - up - CAPTION_GAP, text, color=INK, fontsize=8, ha="center", va="bottom")
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def draw_repair(report: RepairRecord) -> Figure:
    """Draws the panels of `repair_figures` in one figure, two per row."""
    figure = _draw_together(_panels(report), 2 * PANEL_WIDTH, PANEL_HEIGHT)
    figure.suptitle(
        escape_dollars(f"{verdict_on(report).headline}\n{report.target}"), color=INK, fontsize=12
    )
    return figure


def _draw_together(panels: Mapping[str, Draw], width: float, height: float) -> Figure:
    """Draws panels in one figure, two per row."""
    n_rows = max(1, -(-len(panels) // 2))
    figure = new_figure(width, height * n_rows)
    panel_axes = figure.subplots(n_rows, 2, squeeze=False).flatten().tolist()
    for axes, (title, draw) in zip(panel_axes, panels.items(), strict=False):
        draw(axes)
        axes.set_title(title, color=INK, fontsize=10)
    for axes in panel_axes[len(panels) :]:
        axes.set_axis_off()
    return figure


def _panels(report: RepairRecord) -> dict[str, Draw]:
    panels: dict[str, Draw] = {}
    for role, split in pool_by_role(report.candidate or report.splits).items():
        changed = [cell for cell in split.confusion if cell.change]
        if split.margins is not None and split.n:
            panels[f"Margins of {role} data"] = partial(_draw_margins, split.margins)
        if len(_classes(changed)) > MATRIX_CLASSES:
            draw = partial(_draw_confusions, changed, report.class_name)
            panels[f"Confusions that changed, {role} data"] = draw
        elif confusion_changes(changed):
            draw = partial(_draw_matrix, changed, report.class_name)
            panels[f"Change of the confusion matrix, {role} data"] = draw
    if len(report.strength) > 1:
        draw = partial(_draw_strengths, report.path, report.chosen_strength)
        panels["How far to go, samples by strength"] = draw
    search_panels = _search_panels(report)
    if COUNTS_TITLE in search_panels:
        panels[SEARCH_TITLE] = search_panels[COUNTS_TITLE]
    return panels


def _draw_margins(histogram: MarginHistogram, axes: Axes) -> None:
    before, after, edges = histogram.before, histogram.after, histogram.edges
    axes.stairs(before, edges, fill=True, color=GREY, alpha=0.45, label="before")
    axes.stairs(after, edges, color=BLUE, linewidth=1.6, label="after")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    _finish_curves(axes, "margin: wrong below 0, right above", "samples")


def _draw_confusions(cells: Sequence[ConfusionCell], class_name: ClassName, axes: Axes) -> None:
    bars = []
    for cell in confusion_changes(cells)[:PLOTTED_CONFUSIONS]:
        colour = RED if cell.change > 0 else GREEN
        note = f"{cell.before} -> {cell.after}"
        bars.append(_Bar(confusion_title(cell, class_name), cell.change, colour, note))
    _draw_bars(bars, axes)
    axes.axvline(0, color=INK, linewidth=1)
    axes.margins(x=0.25)
    axes.locator_params(axis="x", integer=True)
    style_axes(axes, "wrong predictions, after less before", "")


class _Bar(NamedTuple):
    name: str
    length: float
    colour: str
    note: str


def _draw_bars(bars: Sequence[_Bar], axes: Axes) -> None:
    # The first bar is drawn at the bottom.
    for i, bar in enumerate(reversed(bars)):
        drawn = axes.barh(i, bar.length, color=bar.colour)
        axes.bar_label(drawn, [bar.note], padding=3, fontsize=8)
    names = [escape_dollars(bar.name) for bar in reversed(bars)]
    axes.set_yticks(range(len(bars)), names, fontsize=8)


def _classes(cells: Sequence[ConfusionCell]) -> list[int]:
    classes = set[int]()
    for cell in cells:
        classes |= {cell.label, cell.prediction}
    return sorted(classes)


def _draw_matrix(cells: Sequence[ConfusionCell], class_name: ClassName, axes: Axes) -> None:
    """Draws the change of the confusion matrix. An increase is good only on the diagonal."""
    classes = _classes(cells)
    change = np.zeros((len(classes), len(classes)), dtype=int)
    for cell in cells:
        change[classes.index(cell.label), classes.index(cell.prediction)] = cell.change
    improvement = np.where(np.eye(len(classes), dtype=bool), change, -change)
    # The root makes a change of 1 visible beside 50.
    shade = np.sign(improvement) * np.sqrt(np.abs(improvement))
    most = float(np.abs(shade).max())
    axes.imshow(shade, cmap=CHANGE_COLOURS, vmin=-most, vmax=most)
    size = 9 if len(classes) <= MATRIX_CLASSES // 2 else 7
    for i, j in np.argwhere(change):
        colour = "white" if abs(shade[i, j]) > DARK * most else INK
        axes.text(j, i, f"{change[i, j]:+}", color=colour, fontsize=size, ha="center", va="center")
    labels = [escape_dollars(class_name(label)) for label in classes]
    axes.set_xticks(range(len(classes)), labels, rotation=45)
    axes.set_yticks(range(len(classes)), labels)
    label_axes(axes, "predicted class", "true class")


def _draw_strengths(path: Sequence[StrengthPoint], chosen: float | None, axes: Axes) -> None:
    known = [(point.strength, point.known) for point in path]
    calibration = [(point.strength, point.calibration) for point in path if point.calibration]
    _draw_flips(axes, known)
    if calibration:
        _draw_flips(axes, calibration, "x:", "x:", ", calibration")
    if chosen is not None:
        axes.axvline(chosen, color=INK, linewidth=1, linestyle=":", label="chosen")
    _finish_curves(
        axes,
        "strength: 0 the original weights, 1 the patch",
        "samples" if calibration else "known samples",
    )


def _draw_flips(
    axes: Axes,
    points: Sequence[tuple[float, FlipCounts]],
    repaired_line: str = "o-",
    broken_line: str = "s--",
    data: str = "",
) -> None:
    strengths = [strength for strength, _ in points]
    repaired = [counts.repaired for _, counts in points]
    broken = [counts.broken for _, counts in points]
    axes.plot(strengths, repaired, repaired_line, color=GREEN, label=f"repaired{data}")
    axes.plot(strengths, broken, broken_line, color=RED, label=f"broken{data}")


def _search_panels(report: RepairRecord) -> dict[str, Draw]:
    panels: dict[str, Draw] = {}
    recorded = {} if report.search is None else report.search.curves
    is_dropped = any(rung.name == "search" and not rung.kept for rung in report.rungs)
    across = "iteration (result not kept)" if is_dropped else "iteration"
    for title, labels in SEARCH_PANELS.items():
        curves = {}
        for name, label in labels.items():
            curve = recorded.get(name, ())
            if len(curve) > 1:  # a single value is no curve
                curves[label] = curve
        if curves:
            panels[title] = partial(_draw_search, title, curves, across)
    return panels


def _draw_search(
    title: str, curves: Mapping[str, Sequence[float]], across: str, axes: Axes
) -> None:
    styles = ((GREEN, "-"), (RED, "--"))
    for (label, curve), (colour, line) in zip(curves.items(), styles, strict=False):
        axes.plot(curve, line, color=colour, label=label)
    _finish_curves(axes, across, "scored samples" if title == COUNTS_TITLE else "")
    if "best so far" in curves:  # hides the start, where the mean is far below the best
        values = [value for value in curves["best so far"] if math.isfinite(value)] or [0.0]
        axes.set_ylim(bottom=min(values) - 0.15 * (max(values) - min(values)))


def _finish_curves(axes: Axes, across: str, up: str) -> None:
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    style_axes(axes, across, up)


def weight_figures(
    changes: Mapping[str, Tensor], localization: LocalizationReport | None = None
) -> dict[str, Figure]:
    """Draws the change of each tensor, and of each weight in the matrix that changes most.

    `changes` has new minus old values, whole tensors by state-dict name. If all values are 0, there
    is no figure.
    """
    norms = {name: float(change.double().norm()) for name, change in changes.items()}
    names = sorted((name for name in norms if norms[name]), key=lambda name: -norms[name])
    if not names:
        return {}
    figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
    axes = figure.subplots()
    bars = []
    for name in names[:PLOTTED_TENSORS]:
        label = name
        if len(name) > LABEL_CHARACTERS:  # similar names differ at the end
            label = f"...{name[3 - LABEL_CHARACTERS :]}"
        n_changed = int((changes[name] != 0).sum())
        note = f"{n_changed:,} of {changes[name].numel():,}"
        bars.append(_Bar(label, norms[name], BLUE, note))
    _draw_bars(bars, axes)
    axes.margins(x=0.3)
    axes.set_ylim(-0.6, max(len(bars), 4) - 0.4)
    style_axes(axes, "Euclidean norm of the change; weights changed", "")
    if localization is not None and "localized" in localization.sizes:
        sizes = localization.sizes
        searched = f"searched: {sizes['localized']:,}"
        if "total" in sizes:
            searched += f" of {sizes['total']:,}"
        axes.set_title(f"{searched} weights", color=INK, fontsize=9, loc="left")
    figures = {"Weights, change by tensor": figure}
    for name in [name for name in names if changes[name].ndim > 1][:1]:
        picture = figures[f"Weights, change of {name}"] = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
        _draw_change(picture, changes[name])
    return figures


def _draw_change(figure: Figure, change: Tensor) -> None:
    grid = grid_of(change)
    axes = figure.subplots()
    most = float(np.abs(grid).max())
    image = axes.imshow(
        grid, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, ax=axes, label="added to the weight")
    shape = " x ".join(map(str, change.shape))
    label_axes(axes, f"inputs ({shape}; blank: as before)", "outputs")


def grid_of(change: Tensor) -> npt.NDArray[np.float64]:
    """Reshapes a tensor to an outputs x inputs matrix of at most `GRID_ROWS x GRID_COLUMNS` cells.

    In a larger tensor, each cell stands for several weights and has the largest change among them,
    with its sign.
    """
    n_rows = len(change)
    rows = change.reshape(1, n_rows, -1)
    size = min(n_rows, GRID_ROWS), min(rows.shape[2], GRID_COLUMNS)
    highest = adaptive_max_pool2d(rows, size)[0]
    lowest = -adaptive_max_pool2d(-rows, size)[0]
    grid = torch.where(highest >= -lowest, highest, lowest)
    return grid.double().numpy()


class SummaryCell(NamedTuple):
    """A cell of the summary. Regressions are bad."""

    text: str
    is_bad: bool = False


def summary_columns(report: RepairRecord) -> dict[Role, dict[str, SummaryCell]]:
    """Returns the cells of the summary by role and label."""
    columns = {}
    for role, split in pool_by_role(report.candidate or report.splits).items():
        columns[role] = _summary_column(split, report.pooled_update(role))
    return columns


def _summary_column(split: SplitReport, update: UpdateSplit | None) -> dict[str, SummaryCell]:
    cells = {
        "samples": SummaryCell(f"{split.n:,}"),
        "repaired in target (RR)": SummaryCell(_share(split.repaired_in_target, split.targeted)),
        "repaired, all": SummaryCell(f"{split.repaired:,}"),
        "broken (BR)": SummaryCell(_share(split.broken, split.passed), split.broken > 0),
    }
    judged = split
    if update is not None:
        judged = update.final
        cells["regressions"] = SummaryCell(
            f"{update.trained.broken:,} -> {judged.broken:,}", judged.broken > 0
        )
    cells["negative flip rate (NFR)"] = SummaryCell(percent(judged.rates["negative_flip_rate"]))
    cells["accuracy before"] = SummaryCell(percent(split.accuracy_before))
    cells["accuracy after"] = SummaryCell(percent(split.accuracy_after))
    return cells


def _share(part: int, total: int) -> str:
    return f"{part:,} of {total:,}" if total else "-"


def summary_figure(report: RepairRecord) -> Figure:
    """Draws the verdict above a table of `summary_columns`. The figure is legible at small size."""
    columns = summary_columns(report)
    # Data that the replaced model was not counted on have no regressions.
    labels = max(columns.values(), key=len, default={})
    n_lines = len(labels) + HEAD_ROWS + 1
    width = LABEL_WIDTH + COLUMN_WIDTH * len(columns)
    figure = new_figure(width, ROW_HEIGHT * n_lines, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(n_lines, 0))
    verdict = verdict_on(report)
    colour = TONE_COLOURS[verdict.tone]
    status = report.status.capitalize()
    if report.candidate:
        status += " (what it would do)"
    axes.text(0.03, 0.95, status, color=colour, fontsize=15, weight="bold", va="center")
    answers = _one_line(verdict.answers)
    axes.text(0.03, 1.85, answers, color=colour, fontsize=9, va="center")
    about = _one_line(f"{report.target}; gate {report.gate}")
    axes.text(0.03, 2.6, about, color=MUTED_COLOUR, fontsize=9, va="center")
    first = HEAD_ROWS + 0.45
    for y, label in enumerate(labels, 1):
        axes.axhline(first + y - 0.5, 0.03, 0.97, color=RULE_COLOUR, linewidth=0.6)
        axes.text(0.03, first + y, label, color=INK, fontsize=10, va="center")
    end = partial(axes.text, fontsize=10, ha="right", va="center")
    for i, (role, cells) in enumerate(reversed(columns.items())):
        x = 0.97 - i * COLUMN_WIDTH / width
        end(x, first, role, color=MUTED_COLOUR)
        for y, label in enumerate(labels, 1):
            text, is_bad = cells.get(label, SummaryCell("-"))
            end(x, first + y, text, color=HARM_COLOUR if is_bad else INK, weight="bold")
    return figure


def _one_line(text: str) -> str:
    return escape_dollars(shorten(text, TARGET_CHARACTERS, placeholder=" ..."))
