"""Figures of a repair: margins, confusions, strengths, search, weight changes, samples and a
summary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from textwrap import shorten, wrap
from typing import Any

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
COUNTS_PANEL = "best so far: samples"
SEARCH_PANELS = {
    COUNTS_PANEL: {"patched": "repaired", "broken": "broken"},
    "fitness": {"best": "best so far", "mean": "mean of the swarm"},
    "best so far: mean loss": {"loss_failed": "on failed", "loss_passed": "on passed"},
    "diversity of the swarm": {"diversity": "diversity"},
}
"""Panels of the search by title: curves of `SearchHistory` with their labels."""
PLOTTED_TENSORS, LABEL_CHARACTERS = 12, 34
GRID_ROWS, GRID_COLUMNS = 128, 256
"""Largest picture of a tensor, in cells. In a larger tensor, a cell shows the largest change of
several weights.
"""
LABEL_WIDTH, COLUMN_WIDTH, ROW_HEIGHT = 2.1, 1.0, 0.3  # inches
HEAD_ROWS, TARGET_CHARACTERS = 3.2, 46
HARM_COLOUR, RULE_COLOUR, MUTED_COLOUR = TONE_COLOURS["bad"], "#CCCCCC", "#666666"

Draw = Callable[[Any], None]
"""Function that draws one panel on matplotlib axes."""


def repair_figures(report: RepairRecord) -> dict[str, Any]:
    """Draws a `matplotlib.figure.Figure` for each panel that has data, and returns them by title."""
    figures = {}
    for title, draw in _panels(report).items():
        figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
        draw(figure.subplots())
        figures[title] = figure
    return figures


def reviewer_figures(
    report: RepairRecord, changes: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Draws all figures for a reviewer: panels, the whole search, and `changes` of weights. Returns
    them by title.
    """
    figures = repair_figures(report)
    in_full = None if report.search is None else search_figure(report.search)
    if in_full is not None:
        figures[SEARCH_TITLE] = in_full
    return figures | weight_figures(changes or {}, report.localization)


def gallery_figures(views: Sequence[SampleView]) -> dict[str, Any]:
    """Draws pictures of flipped samples: a figure per split and kind of flip, by title. Skips
    samples shown as text.
    """
    galleries: dict[str, list[SampleView]] = {}
    for view in views:
        if view.pixels is not None:
            galleries.setdefault(f"{view.flip} in {view.split}", []).append(view)
    return {title: _gallery(own) for title, own in galleries.items()}


def _gallery(views: Sequence[SampleView]) -> Any:
    captions = [wrap(view.caption, CAPTION_WIDTH) for view in views]
    caption_height = CAPTION_LINE * (max(map(len, captions)) + 0.5)
    n_columns, cell_height = min(len(views), GALLERY_COLUMNS), GALLERY_CELL + caption_height
    width, height = GALLERY_CELL * n_columns, cell_height * -(-len(views) // n_columns)
    figure = new_figure(width, height, layout=None)
    # All pictures share one pair of axes, in inches from the top left. A pair per picture takes
    # many times longer.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for i, (view, caption) in enumerate(zip(views, captions, strict=True)):
        row, column = divmod(i, n_columns)
        x, y = GALLERY_CELL * (column + 0.5), cell_height * (row + 1) - GALLERY_CELL / 2
        pixels = np.asarray(view.pixels)
        up, across = (
            PICTURE_SHARE * GALLERY_CELL / 2 * np.array(pixels.shape[:2]) / max(pixels.shape[:2])
        )
        axes.imshow(
            pixels, interpolation="nearest", extent=(x - across, x + across, y + up, y - up)
        )
        text = escape_dollars("\n".join(caption))
        axes.text(x, y - up - CAPTION_GAP, text, color=INK, fontsize=8, ha="center", va="bottom")
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def draw_repair(report: RepairRecord) -> Any:
    """Draws the panels of `repair_figures` in one figure, two per row."""
    figure = _drawn(_panels(report), 2 * PANEL_WIDTH, PANEL_HEIGHT)
    figure.suptitle(
        escape_dollars(f"{verdict_on(report).headline}\n{report.target}"), color=INK, fontsize=12
    )
    return figure


def search_figure(search: SearchReport) -> Any:
    """Draws all curves of a search in one figure with several panels. Returns None if the search
    has no curves.
    """
    panels = _search_panels(search)
    return _drawn(panels, SEARCH_WIDTH, SEARCH_ROW) if panels else None


def _drawn(panels: Mapping[str, Draw], width: float, height: float) -> Any:
    figure, axes = panel_grid(len(panels), width, height)
    for own, (title, draw) in zip(axes, panels.items(), strict=True):
        draw(own)
        own.set_title(title, color=INK, fontsize=10)
    return figure


def _panels(report: RepairRecord) -> Mapping[str, Draw]:
    panels: dict[str, Draw] = {}
    splits = report.candidate or report.splits
    for own in by_role(splits).values():
        panels |= _role_panels(pool(own), report.class_name)
    if len(report.strength) > 1:
        panels["How far to go, samples by strength"] = partial(
            _strength, report.path, report.chosen_strength
        )
    course = {} if report.search is None else _search_panels(report.search)
    if COUNTS_PANEL in course:
        panels[SEARCH_TITLE] = course[COUNTS_PANEL]
    return panels


def _role_panels(split: SplitReport, name: Callable[[int], str]) -> dict[str, Draw]:
    panels: dict[str, Draw] = {}
    if split.margins is not None and split.n:
        panels[f"Margins of {split.role} data"] = partial(_margins, split.margins)
    if len(_changed_classes(split.confusion)) > MATRIX_CLASSES:
        panels[f"Confusions that changed, {split.role} data"] = partial(
            _confusions, split.confusion, name
        )
    elif confusion_changes(split.confusion):
        panels[f"Change of the confusion matrix, {split.role} data"] = partial(
            _matrix, split.confusion, name
        )
    return panels


def _margins(histogram: MarginHistogram, axes: Any) -> None:
    axes.stairs(
        histogram.before, histogram.edges, fill=True, color=GREY, alpha=0.45, label="before"
    )
    axes.stairs(histogram.after, histogram.edges, color=BLUE, linewidth=1.6, label="after")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    _finish_curves(axes, "margin: wrong below 0, right above", "samples")


def _confusions(cells: Sequence[ConfusionCell], name: Callable[[int], str], axes: Any) -> None:
    shown = confusion_changes(cells)[:PLOTTED_CONFUSIONS][::-1]
    changes = [cell.after - cell.before for cell in shown]
    labels = [
        escape_dollars(f"{name(cell.label)} taken for {name(cell.prediction)}") for cell in shown
    ]
    bars = axes.barh(
        range(len(shown)), changes, color=[RED if change > 0 else GREEN for change in changes]
    )
    axes.bar_label(
        bars, [f"{cell.before} -> {cell.after}" for cell in shown], padding=3, fontsize=8
    )
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.axvline(0, color=INK, linewidth=1)
    axes.margins(x=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    style_axes(axes, "wrong predictions, after less before", "")


def _changed_classes(cells: Sequence[ConfusionCell]) -> list[int]:
    return sorted(
        {
            one
            for cell in cells
            if cell.before != cell.after
            for one in (cell.label, cell.prediction)
        }
    )


def _matrix(cells: Sequence[ConfusionCell], name: Callable[[int], str], axes: Any) -> None:
    """Draws the change of the confusion matrix for changed classes. An increase is good only on the
    diagonal.
    """
    classes = _changed_classes(cells)
    change = np.zeros((len(classes), len(classes)), dtype=int)
    for cell in cells:
        if cell.before != cell.after:
            change[classes.index(cell.label), classes.index(cell.prediction)] = (
                cell.after - cell.before
            )
    improvement = np.where(np.eye(len(classes), dtype=bool), change, -change)
    shade = np.sign(improvement) * np.sqrt(
        np.abs(improvement)
    )  # so that a change of 1 is visible beside 50
    most = float(np.abs(shade).max())
    axes.imshow(shade, cmap=CHANGE_COLOURS, vmin=-most, vmax=most)
    size = 9 if len(classes) <= MATRIX_CLASSES // 2 else 7
    for i, j in np.argwhere(change):
        colour = "white" if abs(shade[i, j]) > DARK * most else INK
        axes.text(j, i, f"{change[i, j]:+}", color=colour, fontsize=size, ha="center", va="center")
    labels = [escape_dollars(name(label)) for label in classes]
    axes.set_xticks(range(len(classes)), labels, rotation=45)
    axes.set_yticks(range(len(classes)), labels)
    label_axes(axes, "predicted class", "true class")


def _strength(path: Sequence[StrengthPoint], chosen: float | None, axes: Any) -> None:
    at = [point.strength for point in path]
    axes.plot(at, [point.known.repaired for point in path], "o-", color=GREEN, label="repaired")
    axes.plot(at, [point.known.broken for point in path], "s--", color=RED, label="broken")
    held = [(point.strength, point.calibration) for point in path if point.calibration is not None]
    if held:
        at, flips = [strength for strength, _ in held], [flips for _, flips in held]
        axes.plot(
            at, [one.repaired for one in flips], "x:", color=GREEN, label="repaired, calibration"
        )
        axes.plot(at, [one.broken for one in flips], "x:", color=RED, label="broken, calibration")
    if chosen is not None:
        axes.axvline(chosen, color=INK, linewidth=1, linestyle=":", label="chosen")
    across = "strength: 0 the original weights, 1 the patch"
    _finish_curves(axes, across, "samples" if held else "known samples")


def _search_panels(search: SearchReport) -> dict[str, Draw]:
    history = search.curves
    panels: dict[str, Draw] = {}
    for title, names in SEARCH_PANELS.items():
        curves = {
            label: history[name] for name, label in names.items() if len(history.get(name, ())) > 1
        }
        if curves:
            best, up = (
                history.get("best") if "best" in names else None,
                "scored samples" * ("patched" in names),
            )
            panels[title] = partial(_draw_curves, curves, best, up)
    return panels


def _draw_curves(
    curves: Mapping[str, Sequence[float]], best: Sequence[float] | None, up: str, axes: Any
) -> None:
    for (label, curve), colour, line in zip(
        curves.items(), (GREEN, RED), ("-", "--"), strict=False
    ):
        axes.plot(curve, line, color=colour, label=label)
    _finish_curves(axes, "iteration", up)
    if best is not None:  # hides the start, where the mean is far below the best
        known = [value for value in best if math.isfinite(value)] or [0.0]
        axes.set_ylim(bottom=min(known) - 0.15 * (max(known) - min(known)))


def _finish_curves(axes: Any, across: str, up: str) -> None:
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    style_axes(axes, across, up)


def weight_figures(
    changes: Mapping[str, Tensor], localization: LocalizationReport | None = None
) -> dict[str, Any]:
    """Draws the change of each tensor, and of each weight in the tensor that changes most. Returns
    figures by title.

    `changes` has new minus old values, whole tensors by state-dict name. If all values are 0, there
    is no figure.
    """
    changed = {
        name: change.detach().cpu() for name, change in changes.items() if bool((change != 0).any())
    }
    if not changed:
        return {}
    norms = {
        name: float(torch.linalg.vector_norm(change, dtype=torch.float64))
        for name, change in changed.items()
    }
    by_norm = sorted(changed, key=lambda name: -norms[name])
    figures = {
        title: new_figure(PANEL_WIDTH, PANEL_HEIGHT)
        for title in ("Weights, change by tensor", f"Weights, change of {by_norm[0]}")
    }
    bars, picture = figures.values()
    _bars(
        bars.subplots(),
        {name: (changed[name], norms[name]) for name in by_norm[:PLOTTED_TENSORS][::-1]},
    )
    _map(picture, changed[by_norm[0]])
    if localization is not None and "localized" in localization.sizes:
        sizes = localization.sizes
        of = f" of {sizes['total']:,}" if "total" in sizes else ""
        bars.axes[0].set_title(
            f"searched: {sizes['localized']:,}{of} weights", color=INK, fontsize=9, loc="left"
        )
    return figures


def _bars(axes: Any, tensors: Mapping[str, tuple[Tensor, float]]) -> None:
    places = range(len(tensors))
    bars = axes.barh(places, [norm for _, norm in tensors.values()], color=BLUE)
    counts = [
        f"{int((change != 0).sum()):,} of {change.numel():,}" for change, _ in tensors.values()
    ]
    axes.bar_label(bars, counts, padding=3, fontsize=8)
    axes.set_yticks(places, [shorten_name(name, LABEL_CHARACTERS) for name in tensors], fontsize=8)
    axes.margins(x=0.3)
    axes.set_ylim(-0.6, max(len(tensors), 4) - 0.4)
    style_axes(axes, "Euclidean norm of the change; weights changed", "")


def _map(figure: Any, change: Tensor) -> None:
    grid = grid_of(change)
    axes = figure.subplots()
    most = float(np.abs(grid).max())
    image = axes.imshow(
        grid, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, ax=axes, label="added to the weight")
    shape = " x ".join(map(str, change.shape))
    label_axes(
        axes,
        f"inputs ({shape}; blank: as before)" if change.ndim > 1 else "",
        "outputs" * (change.ndim > 1),
    )


def grid_of(change: Tensor) -> npt.NDArray[np.float64]:
    """Reshapes a tensor to an outputs x inputs matrix of at most `GRID_ROWS x GRID_COLUMNS` cells.

    In a larger tensor, each cell stands for several weights and has the largest change among them,
    with its sign.
    """
    rows = change.reshape(1, change.shape[0] if change.ndim > 1 else 1, -1).double()
    size = min(rows.shape[1], GRID_ROWS), min(rows.shape[2], GRID_COLUMNS)
    highest, lowest = adaptive_max_pool2d(rows, size)[0], -adaptive_max_pool2d(-rows, size)[0]
    return torch.where(highest >= -lowest, highest, lowest).numpy()


def summary_rows(
    report: RepairRecord,
) -> tuple[tuple[Role, ...], list[tuple[str, tuple[str, ...]]]]:
    """Returns the roles that have data, and the rows of the summary. A row has a label and one cell
    per role.
    """
    splits = report.candidate or report.splits
    pooled = {role: pool(own) for role, own in by_role(splits).items()}
    updates = {role: report.pooled_update(role) for role in pooled}
    judged = [
        split if (update := updates[role]) is None else update.now for role, split in pooled.items()
    ]
    rows = [("samples", [count(split.n) for split in pooled.values()])]
    rows.append(
        (
            "repaired in target (RR)",
            [_share(s.repaired_in_target, s.targeted) for s in pooled.values()],
        )
    )
    rows.append(("repaired, all", [count(split.repaired) for split in pooled.values()]))
    rows.append(("broken (BR)", [_share(split.broken, split.passed) for split in pooled.values()]))
    if any(updates.values()):
        pairs = [(u.trained.broken, u.now.broken) if u else None for u in updates.values()]
        rows.append(
            (
                "regressions",
                ["-" if pair is None else f"{pair[0]:,} -> {pair[1]:,}" for pair in pairs],
            )
        )
    nfr = [split.rates["negative_flip_rate"] for split in judged]
    rows.append(("negative flip rate (NFR)", [percent(rate) for rate in nfr]))
    rows.append(("accuracy before", [percent(split.accuracy_before) for split in pooled.values()]))
    rows.append(("accuracy after", [percent(split.accuracy_after) for split in pooled.values()]))
    return tuple(pooled), [(label, tuple(cells)) for label, cells in rows]


def summary_figure(report: RepairRecord) -> Any:
    """Draws the verdict above the table of `summary_rows`. The figure is legible at small size."""
    roles, rows = summary_rows(report)
    n_lines = len(rows) + HEAD_ROWS + 1
    width = LABEL_WIDTH + COLUMN_WIDTH * len(roles)
    figure = new_figure(width, ROW_HEIGHT * n_lines, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(n_lines, 0))
    verdict = verdict_on(report)
    status, _, answers = verdict.headline.partition(": ")
    status += " (what it would do)" if report.candidate else ""
    about = f"{report.target}; gate {report.gate}"
    colour = TONE_COLOURS[verdict.tone]
    axes.text(0.03, 0.95, status, color=colour, fontsize=15, weight="bold", va="center")
    for y, line, own in ((1.85, answers, colour), (2.6, about, MUTED_COLOUR)):
        shown = escape_dollars(shorten(line, TARGET_CHARACTERS, placeholder=" ..."))
        axes.text(0.03, y, shown, color=own, fontsize=9, va="center")
    ends = [0.97 - (len(roles) - 1 - i) * COLUMN_WIDTH / width for i in range(len(roles))]
    for role, x in zip(roles, ends, strict=True):
        axes.text(
            x, HEAD_ROWS + 0.45, role, color=MUTED_COLOUR, fontsize=10, ha="right", va="center"
        )
    for i, (label, cells) in enumerate(rows):
        y = HEAD_ROWS + 1.45 + i
        axes.axhline(y - 0.5, 0.03, 0.97, color=RULE_COLOUR, linewidth=0.6)
        harmful = label.startswith(("broken", "regressions"))
        axes.text(0.03, y, label, color=INK, fontsize=10, va="center")
        for cell, x in zip(cells, ends, strict=True):
            harm = harmful and not cell.startswith(("0", "-")) and not cell.endswith("-> 0")
            colour = HARM_COLOUR if harm else INK
            axes.text(x, y, cell, color=colour, fontsize=10, weight="bold", ha="right", va="center")
    return figure


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}" if whole else "-"
