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

from lightning_nrl._utils.formatting import count, percent
from lightning_nrl.records.repair_record import (
    LocalizationReport,
    RepairRecord,
    SearchReport,
    StrengthPoint,
)
from lightning_nrl.records.splits import (
    ConfusionCell,
    MarginHistogram,
    Role,
    SplitReport,
    UpdateSplit,
    by_role,
    pool,
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
    panel_grid,
    shorten_name,
    style_axes,
)
from lightning_nrl.report.sample_views import SampleView
from lightning_nrl.report.tables import confusion_changes
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


class SearchPanel(NamedTuple):
    """A panel of the search. Its curves are those of `SearchHistory`, with their labels."""

    title: str
    labels: Mapping[str, str]
    ylabel: str = ""


COUNTS_PANEL = SearchPanel(
    "best so far: samples", {"patched": "repaired", "broken": "broken"}, "scored samples"
)
SEARCH_PANELS = (
    COUNTS_PANEL,
    SearchPanel("fitness", {"best": "best so far", "mean": "mean of the swarm"}),
    SearchPanel("best so far: mean loss", {"loss_failed": "on failed", "loss_passed": "on passed"}),
    SearchPanel("diversity of the swarm", {"diversity": "diversity"}),
)


def repair_figures(report: RepairRecord) -> dict[str, Figure]:
    """Draws a `matplotlib.figure.Figure` for each panel that has data, by title."""
    figures = {}
    for title, draw in _panels(report).items():
        figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
        draw(figure.subplots())
        figures[title] = figure
    return figures


def reviewer_figures(
    report: RepairRecord, changes: Mapping[str, Tensor] | None = None
) -> dict[str, Figure]:
    """Draws all figures for a reviewer, by title.

    These are the panels, the whole search, and `changes` of weights.
    """
    figures = repair_figures(report)
    if report.search is not None:
        figure = search_figure(report.search)
        if figure is not None:
            figures[SEARCH_TITLE] = figure
    return figures | weight_figures(changes or {}, report.localization)


def gallery_figures(views: Sequence[SampleView]) -> dict[str, Figure]:
    """Draws pictures of flipped samples: a figure per split and kind of flip, by title.

    Skips samples shown as text.
    """
    galleries: dict[str, list[SampleView]] = {}
    for view in views:
        if view.pixels is not None:
            galleries.setdefault(f"{view.flip} in {view.split}", []).append(view)
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
    for i, (view, caption) in enumerate(zip(views, captions, strict=True)):
        row, column = divmod(i, n_columns)
        x = GALLERY_CELL * (column + 0.5)
        y = cell_height * (row + 1) - GALLERY_CELL / 2
        pixels = np.asarray(view.pixels)
        sides = np.array(pixels.shape[:2])
        up, across = PICTURE_SHARE * GALLERY_CELL / 2 * sides / max(sides)
        extent = (x - across, x + across, y + up, y - up)
        axes.imshow(pixels, interpolation="nearest", extent=extent)
        text = escape_dollars("\n".join(caption))
        axes.text(x, y - up - CAPTION_GAP, text, color=INK, fontsize=8, ha="center", va="bottom")
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def draw_repair(report: RepairRecord) -> Figure:
    """Draws the panels of `repair_figures` in one figure, two per row."""
    figure = _draw_together(_panels(report), 2 * PANEL_WIDTH, PANEL_HEIGHT)
    title = escape_dollars(f"{verdict_on(report).headline}\n{report.target}")
    figure.suptitle(title, color=INK, fontsize=12)
    return figure


def search_figure(search: SearchReport) -> Figure | None:
    """Draws all curves of a search in panels of one figure. Returns None without curves."""
    panels = _search_panels(search)
    if not panels:
        return None
    return _draw_together(panels, SEARCH_WIDTH, SEARCH_ROW)


def _draw_together(panels: Mapping[str, Draw], width: float, height: float) -> Figure:
    figure, panel_axes = panel_grid(len(panels), width, height)
    for axes, (title, draw) in zip(panel_axes, panels.items(), strict=True):
        draw(axes)
        axes.set_title(title, color=INK, fontsize=10)
    return figure


def _panels(report: RepairRecord) -> Mapping[str, Draw]:
    panels: dict[str, Draw] = {}
    for splits in by_role(report.candidate or report.splits).values():
        panels |= _role_panels(pool(splits), report.class_name)
    if len(report.strength) > 1:
        draw = partial(_draw_strengths, report.path, report.chosen_strength)
        panels["How far to go, samples by strength"] = draw
    if report.search is not None:
        search_panels = _search_panels(report.search)
        if COUNTS_PANEL.title in search_panels:
            panels[SEARCH_TITLE] = search_panels[COUNTS_PANEL.title]
    return panels


def _role_panels(split: SplitReport, class_name: Callable[[int], str]) -> dict[str, Draw]:
    panels: dict[str, Draw] = {}
    data, cells = f"{split.role} data", split.confusion
    if split.margins is not None and split.n:
        panels[f"Margins of {data}"] = partial(_draw_margins, split.margins)
    if len(_changed_classes(cells)) > MATRIX_CLASSES:
        draw = partial(_draw_confusions, cells, class_name)
        panels[f"Confusions that changed, {data}"] = draw
    elif confusion_changes(cells):
        draw = partial(_draw_matrix, cells, class_name)
        panels[f"Change of the confusion matrix, {data}"] = draw
    return panels


def _draw_margins(histogram: MarginHistogram, axes: Axes) -> None:
    before, after, edges = histogram.before, histogram.after, histogram.edges
    axes.stairs(before, edges, fill=True, color=GREY, alpha=0.45, label="before")
    axes.stairs(after, edges, color=BLUE, linewidth=1.6, label="after")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    _finish_curves(axes, "margin: wrong below 0, right above", "samples")


def _draw_confusions(
    cells: Sequence[ConfusionCell], class_name: Callable[[int], str], axes: Axes
) -> None:
    names, changes, counts, colours = [], [], [], []
    # The first bar is drawn at the bottom.
    for cell in reversed(confusion_changes(cells)[:PLOTTED_CONFUSIONS]):
        label, prediction = class_name(cell.label), class_name(cell.prediction)
        names.append(escape_dollars(f"{label} taken for {prediction}"))
        changes.append(cell.after - cell.before)
        counts.append(f"{cell.before} -> {cell.after}")
        colours.append(RED if cell.after > cell.before else GREEN)
    places = range(len(names))
    bars = axes.barh(places, changes, color=colours)
    axes.bar_label(bars, counts, padding=3, fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.axvline(0, color=INK, linewidth=1)
    axes.margins(x=0.25)
    axes.locator_params(axis="x", integer=True)
    style_axes(axes, "wrong predictions, after less before", "")


def _changed_classes(cells: Sequence[ConfusionCell]) -> list[int]:
    classes = set[int]()
    for cell in cells:
        if cell.before != cell.after:
            classes |= {cell.label, cell.prediction}
    return sorted(classes)


def _draw_matrix(
    cells: Sequence[ConfusionCell], class_name: Callable[[int], str], axes: Axes
) -> None:
    """Draws the change of the confusion matrix. An increase is good only on the diagonal."""
    classes = _changed_classes(cells)
    change = np.zeros((len(classes), len(classes)), dtype=int)
    for cell in cells:
        if cell.before != cell.after:
            place = classes.index(cell.label), classes.index(cell.prediction)
            change[place] = cell.after - cell.before
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
    strengths = [point.strength for point in path]
    axes.plot(
        strengths, [point.known.repaired for point in path], "o-", color=GREEN, label="repaired"
    )
    axes.plot(strengths, [point.known.broken for point in path], "s--", color=RED, label="broken")
    strengths, repaired, broken = [], [], []
    for point in path:
        if point.calibration is not None:
            strengths.append(point.strength)
            repaired.append(point.calibration.repaired)
            broken.append(point.calibration.broken)
    if strengths:
        axes.plot(strengths, repaired, "x:", color=GREEN, label="repaired, calibration")
        axes.plot(strengths, broken, "x:", color=RED, label="broken, calibration")
    if chosen is not None:
        axes.axvline(chosen, color=INK, linewidth=1, linestyle=":", label="chosen")
    across = "strength: 0 the original weights, 1 the patch"
    _finish_curves(axes, across, "samples" if strengths else "known samples")


def _search_panels(search: SearchReport) -> dict[str, Draw]:
    panels: dict[str, Draw] = {}
    for panel in SEARCH_PANELS:
        curves = {name: search.curves.get(name, ()) for name in panel.labels}
        # A single value is no curve.
        curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
        if curves:
            panels[panel.title] = partial(_draw_search, panel, curves)
    return panels


def _draw_search(panel: SearchPanel, curves: Mapping[str, Sequence[float]], axes: Axes) -> None:
    styles = ((GREEN, "-"), (RED, "--"))
    for (name, curve), (colour, line) in zip(curves.items(), styles, strict=False):
        axes.plot(curve, line, color=colour, label=panel.labels[name])
    _finish_curves(axes, "iteration", panel.ylabel)
    if "best" in curves:  # hides the start, where the mean is far below the best
        values = [value for value in curves["best"] if math.isfinite(value)] or [0.0]
        axes.set_ylim(bottom=min(values) - 0.15 * (max(values) - min(values)))


def _finish_curves(axes: Axes, across: str, up: str) -> None:
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    style_axes(axes, across, up)


def weight_figures(
    changes: Mapping[str, Tensor], localization: LocalizationReport | None = None
) -> dict[str, Figure]:
    """Draws the change of each tensor, and of each weight in the tensor that changes most.

    `changes` has new minus old values, whole tensors by state-dict name. If all values are 0, there
    is no figure.
    """
    changed = {}
    norms = {}
    for name, change in changes.items():
        if bool((change != 0).any()):
            changed[name] = change.detach().cpu()
            norms[name] = float(torch.linalg.vector_norm(changed[name], dtype=torch.float64))
    if not changed:
        return {}
    names = sorted(changed, key=lambda name: -norms[name])
    bars = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
    axes = bars.subplots()
    # The first bar is drawn at the bottom.
    shown = names[:PLOTTED_TENSORS][::-1]
    _draw_norms(axes, {name: changed[name] for name in shown}, [norms[name] for name in shown])
    if localization is not None and "localized" in localization.sizes:
        sizes = localization.sizes
        searched = f"searched: {sizes['localized']:,}"
        if "total" in sizes:
            searched += f" of {sizes['total']:,}"
        axes.set_title(f"{searched} weights", color=INK, fontsize=9, loc="left")
    picture = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
    _draw_change(picture, changed[names[0]])
    return {"Weights, change by tensor": bars, f"Weights, change of {names[0]}": picture}


def _draw_norms(axes: Axes, changes: Mapping[str, Tensor], norms: Sequence[float]) -> None:
    places = range(len(changes))
    bars = axes.barh(places, norms, color=BLUE)
    counts = [f"{int((x != 0).sum()):,} of {x.numel():,}" for x in changes.values()]
    axes.bar_label(bars, counts, padding=3, fontsize=8)
    axes.set_yticks(places, [shorten_name(name, LABEL_CHARACTERS) for name in changes], fontsize=8)
    axes.margins(x=0.3)
    axes.set_ylim(-0.6, max(len(changes), 4) - 0.4)
    style_axes(axes, "Euclidean norm of the change; weights changed", "")


def _draw_change(figure: Figure, change: Tensor) -> None:
    grid = grid_of(change)
    axes = figure.subplots()
    most = float(np.abs(grid).max())
    image = axes.imshow(
        grid, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, ax=axes, label="added to the weight")
    if change.ndim > 1:
        shape = " x ".join(map(str, change.shape))
        label_axes(axes, f"inputs ({shape}; blank: as before)", "outputs")
    else:
        label_axes(axes, "", "")


def grid_of(change: Tensor) -> npt.NDArray[np.float64]:
    """Reshapes a tensor to an outputs x inputs matrix of at most `GRID_ROWS x GRID_COLUMNS` cells.

    In a larger tensor, each cell stands for several weights and has the largest change among them,
    with its sign.
    """
    n_rows = change.shape[0] if change.ndim > 1 else 1
    rows = change.reshape(1, n_rows, -1).double()
    size = min(n_rows, GRID_ROWS), min(rows.shape[2], GRID_COLUMNS)
    highest = adaptive_max_pool2d(rows, size)[0]
    lowest = -adaptive_max_pool2d(-rows, size)[0]
    grid: npt.NDArray[np.float64] = torch.where(highest >= -lowest, highest, lowest).numpy()
    return grid


class SummaryCell(NamedTuple):
    """A cell of the summary. Regressions are bad."""

    text: str
    is_bad: bool = False


def summary_rows(
    report: RepairRecord,
) -> tuple[tuple[Role, ...], list[tuple[str, tuple[SummaryCell, ...]]]]:
    """Returns the roles that have data, and the rows of the summary: a label, a cell per role."""
    splits_by_role = by_role(report.candidate or report.splits)
    columns = [
        _summary_column(pool(splits), report.pooled_update(role))
        for role, splits in splits_by_role.items()
    ]
    # Data that the replaced model was not counted on have no regressions.
    labels = max(columns, key=len, default={})
    rows = []
    for label in labels:
        cells = [column.get(label, SummaryCell("-")) for column in columns]
        rows.append((label, tuple(cells)))
    return tuple(splits_by_role), rows


def _summary_column(split: SplitReport, update: UpdateSplit | None) -> dict[str, SummaryCell]:
    cells = {
        "samples": SummaryCell(count(split.n)),
        "repaired in target (RR)": SummaryCell(_share(split.repaired_in_target, split.targeted)),
        "repaired, all": SummaryCell(count(split.repaired)),
        "broken (BR)": SummaryCell(_share(split.broken, split.passed), split.broken > 0),
    }
    judged = split
    if update is not None:
        judged = update.now
        regressions = f"{update.trained.broken:,} -> {judged.broken:,}"
        cells["regressions"] = SummaryCell(regressions, judged.broken > 0)
    nfr = judged.rates["negative_flip_rate"]
    return {
        **cells,
        "negative flip rate (NFR)": SummaryCell(percent(nfr)),
        "accuracy before": SummaryCell(percent(split.accuracy_before)),
        "accuracy after": SummaryCell(percent(split.accuracy_after)),
    }


def _share(part: int, total: int) -> str:
    return f"{part:,} of {total:,}" if total else "-"


def summary_figure(report: RepairRecord) -> Figure:
    """Draws the verdict above the table of `summary_rows`. The figure is legible at small size."""
    roles, rows = summary_rows(report)
    n_lines = len(rows) + HEAD_ROWS + 1
    width = LABEL_WIDTH + COLUMN_WIDTH * len(roles)
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
    ends = [0.97 - (len(roles) - 1 - i) * COLUMN_WIDTH / width for i in range(len(roles))]
    y = HEAD_ROWS + 0.45
    for role, x in zip(roles, ends, strict=True):
        axes.text(x, y, role, color=MUTED_COLOUR, fontsize=10, ha="right", va="center")
    for label, cells in rows:
        y += 1
        axes.axhline(y - 0.5, 0.03, 0.97, color=RULE_COLOUR, linewidth=0.6)
        axes.text(0.03, y, label, color=INK, fontsize=10, va="center")
        for (text, is_bad), x in zip(cells, ends, strict=True):
            colour = HARM_COLOUR if is_bad else INK
            axes.text(x, y, text, color=colour, fontsize=10, weight="bold", ha="right", va="center")
    return figure


def _one_line(text: str) -> str:
    return escape_dollars(shorten(text, TARGET_CHARACTERS, placeholder=" ..."))
