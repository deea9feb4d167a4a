"""Draws figures 2 to 6 of the paper, and repaired against broken samples, from a study's tables.

    python examples/case_study/figures.py runs/study_vehicles_0 --out docs/figures

Pale marks are runs. Dark marks are means over runs with 95 % intervals.
"""

from __future__ import annotations

import argparse
import random
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from grid import LINES, Line
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from questions import Tables, fewest_broken, interval, like

from lightning_nrl.analysis.baselines import BASELINES
from lightning_nrl.analysis.comparison import Comparison
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.report import RepairReport
from lightning_nrl.study import TABLE_II, Run, SweepResult

BLUE, VERMILLION, GREEN, FAINT, INK = "#0072B2", "#D55E00", "#009E73", "#b8bcc2", "#333a42"
LOOKS = {"broken": (VERMILLION, "o"), "repaired": (BLUE, "^")}
"""Marker shapes, so that the figures can be read without colour."""
TICKS = (0, 1, 5, 10, 25, 50, 100, 200, 400, 800, 1600)
KEY = (
    "Dot: a run of a setting; diamond: mean of a row of the paper's Table II, "
    "filled where it is of this experiment;\n"
    "star: this package; square: a baseline; line: as many broken as repaired"
)
ROLES = ("known", "unseen")
NAMES = {"A": "A: partly occluded", "B": "B: front and back", "C": "C: front and back, drift"}


def draw_all(
    tables: Tables, folder: Path, others: Mapping[str, Sequence[Other]] | None = None
) -> list[Path]:
    """Draws the figures that the tables have runs for, and returns their files."""
    figures = {"figure_2": accuracies(tables), "figure_3": counts(tables)}
    for line in LINES:
        figure = along(tables, line)
        figures |= {} if figure is None else {f"figure_{line.figure}": figure}
    for experiment, runs in tables.items():
        figures[f"trade_{experiment}"] = trade(experiment, runs, (others or {}).get(experiment, ()))
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, figure in figures.items():
        found.append(folder / f"{name}.png")
        figure.savefig(found[-1], dpi=110)
        Image.open(found[-1]).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
            found[-1], optimize=True
        )
    return found


def tables_of(folder: Path) -> dict[str, tuple[Run, ...]]:
    """Reads the tables of a study that exist: `A/sweep.csv`, `B/sweep.csv` and `C/sweep.csv`."""
    paths = {experiment: folder / experiment / "sweep.csv" for experiment in NAMES}
    return {
        experiment: SweepResult.from_csv(path).runs
        for experiment, path in paths.items()
        if path.exists()
    }


def accuracies(tables: Tables) -> Figure:
    """Draws figure 2: change of unseen accuracy in the setting that breaks fewest known samples."""
    cases = _cases(tables)
    figure = _figure(
        1.5 + 1.25 * len(cases), 4.2, "Accuracy on unseen data where the fewest known samples break"
    )
    axes = figure.subplots()
    axes.axhline(0, color=INK, linewidth=1)
    for at, runs in enumerate(cases.values()):
        gains = [100 * (run.unseen.accuracy_after - run.unseen.accuracy_before) for run in runs]
        _dots(axes, at, gains, "repaired", "" if at else "runs and mean")
    before = [
        f"{case}\nbefore: {100 * runs[0].unseen.accuracy_before:.1f} %"
        for case, runs in cases.items()
    ]
    axes.set_xticks(range(len(cases)), before)
    axes.set_ylabel("change of accuracy, points", color=INK)
    axes.margins(x=0.08, y=0.1)
    figure.legend(loc="outside upper right", frameon=False, fontsize=8, labelcolor=INK)
    return figure


def counts(tables: Tables) -> Figure:
    """Draws figure 3: broken and repaired samples of the same runs."""
    cases = _cases(tables)
    figure = _figure(
        1.5 + 1.25 * len(cases), 6.4, "Broken and repaired where the fewest known samples break"
    )
    panels = figure.subplots(2, 1, sharex=True)
    for axes, role in zip(panels, ROLES, strict=True):
        for at, runs in enumerate(cases.values()):
            for side, what in ((-0.2, "broken"), (0.2, "repaired")):
                values = [getattr(run.counts(role), what) for run in runs]
                _dots(
                    axes,
                    at + side,
                    values,
                    what,
                    "" if at or role == "unseen" else what,
                    width=0.08,
                )
        axes.set_ylim(bottom=0)
        axes.margins(x=0.06)
        axes.set_ylabel(f"{role} samples", color=INK)
    panels[1].set_xticks(range(len(cases)), cases)
    figure.legend(loc="outside upper right", frameon=False, fontsize=8, labelcolor=INK, ncols=2)
    return figure


def along(tables: Tables, line: Line) -> Figure | None:
    """Draws figures 4, 5 and 6: broken and repaired by one parameter.

    Returns None without such runs.
    """
    own = {
        name: found
        for name, runs in tables.items()
        if all(found := [like(runs, row) for row in line.settings(name)])
    }
    if not own:
        return None
    figure = _figure(1.2 + 3.0 * len(own), 5.4, f"Broken and repaired against the {line.words}")
    panels = figure.subplots(2, len(own), squeeze=False, sharex=True, sharey="row")
    for row, role in zip(panels, ROLES, strict=True):
        for axes, (name, settings) in zip(row, own.items(), strict=True):
            for what, (colour, _) in LOOKS.items():
                values = [[getattr(run.counts(role), what) for run in runs] for runs in settings]
                for at, cell in enumerate(values):
                    _dots(axes, at, cell, what, "" if at else what, width=0.1)
                axes.plot([fmean(cell) for cell in values], color=colour, linewidth=1.3)
            axes.set_xticks(range(len(settings)), [_tick(line, runs) for runs in settings])
            if role == "known":
                shown = " (in the paper)" if name in line.shown else ""
                axes.set_title(
                    f"{NAMES[name]}{shown}\nas {line.rows[name]}", color=INK, fontsize=9, loc="left"
                )
            else:
                axes.set_xlabel(line.words, color=INK, fontsize=9)
        row[0].set_ylim(bottom=0)
        row[0].set_ylabel(f"{role} samples", color=INK)
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(
        *handles, loc="outside upper right", frameon=False, fontsize=8, labelcolor=INK, ncols=2
    )
    return figure


@dataclass(frozen=True)
class Other:
    """Counts of another method, for comparison with the settings of the paper."""

    name: str
    known: FlipCounts
    unseen: FlipCounts
    repair: bool


def others_of(experiment: str, seed: int, folder: Path = Path("runs")) -> list[Other]:
    """Reads the counts of the default method and the baselines from the files of their studies."""
    found = []
    report = folder / f"vehicles_{experiment}_default" / f"seed_{seed}" / "report.json"
    comparison = folder / f"comparison_vehicles_{experiment}_{seed}" / "comparison.json"
    if report.exists():
        repair = RepairReport.from_json(report.read_text())
        found.append(
            Other("default method", repair.pooled("known"), repair.pooled("unseen"), repair=True)
        )
    if comparison.exists():
        entries = Comparison.from_json(comparison.read_text()).entries
        given = {
            entry.method: entry.given
            for entry in entries
            if entry.method in BASELINES and entry.given
        }
        found += [
            Other(name, point.known, point.unseen, repair=False) for name, point in given.items()
        ]
    return found


def trade(experiment: str, runs: Sequence[Run], others: Sequence[Other] = ()) -> Figure:
    """Plots repaired against broken samples on square-root scales.

    The marks are runs, means of Table II and other methods.
    """
    figure = _figure(11, 5.2, f"{NAMES[experiment]}: what is repaired for what breaks")
    figure.supxlabel(KEY, color=INK, fontsize=8, x=0.01, ha="left")
    panels = figure.subplots(1, 2)
    for axes, role in zip(panels, ROLES, strict=True):
        x, y = (
            [getattr(run.counts(role), what) for run in runs] for what in ("broken", "repaired")
        )
        axes.plot(x, y, ".", color=FAINT, markersize=4, zorder=1)
        points = []
        for name, row in TABLE_II.items():
            if own := like(runs, row):
                at = tuple(fmean(getattr(run.counts(role), what) for run in own) for what in LOOKS)
                its = name.startswith(f"EXP-{experiment}")
                points.append(
                    (name.removeprefix("EXP-"), at, BLUE, "D", 6, BLUE if its else "white")
                )
        for other in others:
            found = getattr(other, role)
            looks = (GREEN, "*", 14, GREEN) if other.repair else (VERMILLION, "s", 6, VERMILLION)
            points.append((other.name, (found.broken, found.repaired), *looks))
        for i, (name, at, colour, shape, size, inside) in enumerate(points):
            axes.plot(
                *at, shape, color=colour, markersize=size, mfc=inside, zorder=3, clip_on=False
            )
            near = (5, 5 if i % 2 else -11)
            axes.annotate(
                name, at, near, textcoords="offset points", color=colour, fontsize=8, zorder=4
            )
        _square_roots(
            axes, [*x, *(point[1][0] for point in points)], [*y, *(point[1][1] for point in points)]
        )
        axes.set_title(
            f"{role} data: {runs[0].counts(role).n:,} samples", color=INK, fontsize=10, loc="left"
        )
        axes.set_xlabel("broken (was right, now wrong)", color=INK)
    panels[0].set_ylabel("repaired (was wrong, now right)", color=INK)
    return figure


def _square_roots(axes: Any, x: Sequence[float], y: Sequence[float]) -> None:
    """Sets square-root scales, which show 0, 5 and 500 at once; draws the line of equal counts."""
    right, top = 1.25 * max(1, *x), 1.1 * max(1, *y)
    axes.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    axes.set_yscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    axes.set_xticks([tick for tick in TICKS if tick <= right])
    axes.set_yticks([tick for tick in TICKS if tick <= top])
    axes.plot([0, min(right, top)], [0, min(right, top)], color=FAINT, linewidth=0.8, zorder=0)
    axes.set_xlim(0, right)
    axes.set_ylim(0, top)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)


def _cases(tables: Tables) -> dict[str, list[Run]]:
    """Selects per experiment the setting that breaks the fewest known samples, and the paper's."""
    found = {}
    for name, runs in tables.items():
        best = fewest_broken(runs)
        found[f"{name}: fewest\n" + textwrap.fill(best[0].setting, 15)] = best
        if paper := like(runs, TABLE_II[f"EXP-{name}1"]):
            found[f"{name}: EXP-{name}1\n" + textwrap.fill(paper[0].setting, 15)] = paper
    return found


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha="left")
    return figure


def _dots(
    axes: Any, at: float, values: Sequence[float], what: str, label: str, width: float = 0.12
) -> None:
    """Draws values as pale dots with jitter, and their mean with its interval next to them."""
    colour, shape = LOOKS[what]
    rng = random.Random(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    axes.plot(
        [at + rng.uniform(-width, width) for _ in values],
        values,
        shape,
        color=colour,
        alpha=0.3,
        markersize=4,
    )
    mean = interval(values)
    axes.errorbar(
        at,
        mean.mean,
        [[mean.mean - mean.low], [mean.high - mean.mean]],
        fmt=shape,
        color=colour,
        markersize=7,
        capsize=3,
        markeredgecolor="white",
        label=label or None,
        zorder=3,
    )


def _tick(line: Line, runs: Sequence[Run]) -> str:
    """Labels a tick with its value and, if different, the number of localised weights."""
    value, found = getattr(runs[0], line.axis), runs[0].n_localized
    return (
        f"{value}\n({found} found)" if line.axis == "n_weights" and found != value else f"{value:g}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of the tables")
    parser.add_argument("--out", type=Path, help="folder of the figures; default: the same folder")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the repair and the baselines to draw"
    )
    chosen = parser.parse_args()
    tables = tables_of(chosen.study)
    if not tables:
        raise SystemExit(f"{chosen.study} has no tables.\nHINT: run study.py first.")
    others = {experiment: others_of(experiment, chosen.seed) for experiment in tables}
    for path in draw_all(tables, chosen.out or chosen.study, others):
        print(path)
