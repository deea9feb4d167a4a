"""Compares methods and baselines on one problem: counts, page and figure."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_nrl._utils.atomic_files import write_text
from lightning_nrl._utils.formatting import count, plural
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.registry import Registry
from lightning_nrl._utils.timing import Observer, StageTimer
from lightning_nrl.analysis.baselines import BASELINES, Interpolation
from lightning_nrl.data.batch import Source
from lightning_nrl.errors import (
    ConfigurationError,
    EmptyLocalizationError,
    EvaluationError,
    OtherRankError,
    ReplayError,
    check_choice,
)
from lightning_nrl.evaluation import Evaluator, SampleOptions
from lightning_nrl.evaluation.layers import find_scope, layer_names
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.methods import METHODS, AnyMethod, Problem, Solution, Training, solve
from lightning_nrl.pipeline.baseline import HeldOut, evaluate_baseline
from lightning_nrl.pipeline.input_checks import check_sources, check_targets, given_or_default
from lightning_nrl.pipeline.problem_builder import build_problem
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.pipeline.strength import PatchPath
from lightning_nrl.records import Provenance, StrengthPoint
from lightning_nrl.report import Report
from lightning_nrl.report.figures import (
    INK,
    PALETTE,
    Plotted,
    escape_dollars,
    label_axes,
    new_figure,
)
from lightning_nrl.report.page import Block, FactList, Heading, Page, Row, Table, Text

__all__ = ["Comparison", "CurvePoint", "Entry", "Methods", "compare_module", "parse_methods"]

COMPARED_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
SCALING_STEP = 1 / 64  # the bisection for a strength stops at this distance
NOTHING_UNSEEN = FlipCounts(0, 0, 0, 0)

ALL_METHODS: Registry[AnyMethod] = Registry(
    METHODS.kind, METHODS.example, METHODS.fits, include=(METHODS, BASELINES)
)
COMPARED_BY_DEFAULT = ("auto", "finetune-polish", "convex", "linearized", "swarm", *BASELINES)
"""Methods that a comparison runs by default."""

Methods = Sequence[str | AnyMethod] | Mapping[str, str | AnyMethod]
"""Methods and baselines, each by name or as an object. The keys of a mapping are their names in the
results.
"""


def compare_module(
    model: nn.Module | Evaluator,
    known: Sequence[Source],
    settings: Settings | None = None,
    *,
    unseen: Sequence[Source] = (),
    methods: Methods | None = None,
    training: Training | None = None,
    observer: Observer | None = None,
) -> Comparison:
    """Runs methods one by one on the same problem, from the same weights and with the same seed.

    The model stays unchanged, and no gate judges the results. Samples are counted under the weights
    w0 + t (w - w0), with w0 before the method and w after it, at several t and at the largest t
    found that breaks no known sample.

    Model, data and `settings` are as in `repair_module`. Each method has the full `max_time`, and
    unseen data are only counted. `methods` are names of `METHODS` and `BASELINES`, or objects;
    None: `COMPARED_BY_DEFAULT`. `training` continues or repeats the model's own training; the
    baselines further training and retraining need it.

    Raises:
        ConfigurationError: an argument is invalid, no failed sample is in the target, or no known
            sample passes.
        EvaluationError: the original model gives losses that are not finite.
    """
    settings, evaluator = given_or_default(settings), Evaluator.of(model)
    model = evaluator.model
    chosen = parse_methods(methods)
    check_sources(known, unseen, settings)
    include_bias = settings.localizer.include_bias
    layers = find_scope(model, settings.layer, include_bias=include_bias, called=evaluator.called)
    with preserve_state(model):
        collecting = StageTimer(observer)
        bare = replace(settings, samples=SampleOptions(importance=settings.samples.importance))
        baseline = evaluate_baseline(evaluator, known, bare, unseen=unseen, clock=collecting)
        check_targets(baseline.before, settings)
        problem = build_problem(
            evaluator, known, baseline.before, layers, settings, training=training
        )
        later = baseline.held_out.get("unseen")
        entries: list[Entry] = []
        found: list[tuple[AnyMethod, Solution, float]] = []
        for name, method in chosen.items():
            with preserve_state(model):
                torch.manual_seed(settings.seed)
                clock = StageTimer(observer, settings.max_time)
                clock.seconds.update(
                    collecting.seconds
                )  # tells methods the time for a pass over the data
                solution, seconds = _run_method(method, replace(problem, clock=clock), found)
                found.append((method, solution, seconds))
                entries.append(_entry(problem, later, name, solution, seconds))
    targets, target, layer = (
        int(problem.before.targeted.sum()),
        str(settings.target),
        layer_names(settings.layer),
    )
    origin = Provenance.of(
        model, baseline.known, *(data.before for data in baseline.held_out.values())
    )
    return Comparison(
        tuple(entries), targets, target, ", ".join(layer), settings.seed, provenance=origin
    )


def parse_methods(methods: Methods | None) -> dict[str, AnyMethod]:
    """Returns methods by name. Raises `ConfigurationError` if a method is unknown or given twice."""
    methods = (
        COMPARED_BY_DEFAULT
        if methods is None
        else (methods,)
        if isinstance(methods, str)
        else methods
    )
    if not isinstance(methods, (Mapping, Sequence)):
        raise ConfigurationError(
            f"`methods={methods!r}` is no list.", "give a list of names or of objects."
        )
    named = isinstance(methods, Mapping)
    names = [
        str(method) if named or isinstance(method, str) else type(method).__name__
        for method in methods
    ]
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(
            f"`methods` are {names}.",
            "name each method once; the keys of a mapping are names of methods.",
        )
    given = methods.values() if isinstance(methods, Mapping) else methods
    return {
        name: ALL_METHODS.parse("methods", method)
        for name, method in zip(names, given, strict=True)
    }


def _run_method(
    method: AnyMethod, problem: Problem, found: Sequence[tuple[AnyMethod, Solution, float]]
) -> tuple[Solution, float]:
    """Runs and times a method. An `Interpolation` reuses the solution of `method.new` if that has
    been run before.
    """
    began, earlier = time.perf_counter(), 0.0
    try:
        if isinstance(method, Interpolation):
            ends = [(end, seconds) for other, end, seconds in found if other == method.new]
            end, earlier = ends[0] if ends else (method.new(problem), 0.0)
            solution = method.towards(problem, end)
        else:
            solution = solve(method, problem)
    except OtherRankError:
        raise  # the other rank has stopped
    except (ConfigurationError, EmptyLocalizationError, ReplayError, EvaluationError) as error:
        solution = Solution(None, str(error).partition("\n")[0])
    return solution, earlier + time.perf_counter() - began


def _entry(
    problem: Problem, unseen: HeldOut | None, name: str, solution: Solution, seconds: float
) -> Entry:
    if solution.proposal is None:
        return Entry(name, seconds, note=solution.reason)
    path = PatchPath(problem, solution.proposal.state)
    later = (
        NOTHING_UNSEEN
        if unseen is None
        else FlipCounts.of(unseen.before.right, unseen.before.right)
    )
    start = CurvePoint(0.0, 0, FlipCounts.of(problem.before.right, problem.before.right), later)
    curve = (start, *(_point(path, unseen, point) for point in path.count(COMPARED_STRENGTHS)))
    began = time.perf_counter()
    scaled = _scale_back(path, unseen, curve)
    note = solution.steps[-1].note if solution.steps else ""
    return Entry(name, seconds, curve, scaled, time.perf_counter() - began, note)


def _scale_back(path: PatchPath, unseen: HeldOut | None, curve: Sequence[CurvePoint]) -> CurvePoint:
    """Bisects for the largest strength that breaks no known sample, as if larger strengths always
    broke more.
    """
    low = [point for point in curve if not point.known.broken][-1]
    above = [point.strength for point in curve if point.strength > low.strength]
    bottom, top = low.strength, above[0] if above else low.strength
    while top - bottom > SCALING_STEP:
        middle = (bottom + top) / 2
        bottom, top = (bottom, middle) if path.point(middle).known.broken else (middle, top)
    return low if bottom == low.strength else _point(path, unseen, path.point(bottom))


def _point(path: PatchPath, unseen: HeldOut | None, counted: StrengthPoint) -> CurvePoint:
    later = NOTHING_UNSEEN
    if unseen is not None:
        later = unseen.flips(path.problem.evaluator, path.state(counted.strength)).counts()
    return CurvePoint(counted.strength, counted.repaired_in_target, counted.known, later)


@dataclass(frozen=True)
class CurvePoint:
    """Counts under the weights w0 + strength (w - w0), with the weights w0 before a method and w
    after it.
    """

    strength: float
    targeted: int  # number of repaired targets
    known: FlipCounts
    unseen: FlipCounts

    @property
    def gain(self) -> float:
        """Change of accuracy on unseen data, in percentage points. NaN without unseen data."""
        return (
            100 * (self.unseen.repaired - self.unseen.broken) / self.unseen.n
            if self.unseen.n
            else math.nan
        )


@dataclass(frozen=True)
class Entry:
    """The result of one method.

    Attributes:
        seconds: wall time of the method.
        curve: counts at rising strengths from 0 to 1; empty if the method failed.
        scaled: counts at the largest strength found that breaks no known sample; None if the method
            failed.
        scaling: seconds that the search for `scaled` took.
        note: the method's remark on its result, or the reason why it failed.
    """

    method: str
    seconds: float
    curve: tuple[CurvePoint, ...] = ()
    scaled: CurvePoint | None = None
    scaling: float = 0.0
    note: str = ""

    @property
    def given(self) -> CurvePoint | None:
        """Counts under the method's weights, at strength 1. None if the method failed."""
        return self.curve[-1] if self.curve else None


@dataclass(frozen=True)
class Comparison(Report, Plotted):
    """Several methods on one problem. `rich.print(comparison)` shows it as a table.

    Attributes:
        entries: one per method, in the order of their runs.
        targets, target: number of failures to repair, and these failures in words.
    """

    entries: tuple[Entry, ...]
    targets: int
    target: str
    layer: str
    seed: int

    def page(self, full: bool = False) -> Page:
        shown = [entry for entry in self.entries if entry.curve]
        blocks: list[Block] = [Heading("Comparison", 1), Text(_summary(self, shown))]
        if shown:
            blocks.append(_table(self, shown))
            if any(entry.scaled is not None and entry.scaled.strength < 1 for entry in shown):
                blocks.append(Text(SCALED_NOTE))
        left_out = tuple((entry.method, entry.note) for entry in self.entries if not entry.curve)
        if left_out:
            blocks += [Heading("Left out"), FactList(left_out)]
        facts = (("target", self.target), ("layer", self.layer), ("seed", str(self.seed)))
        return Page((*blocks, FactList(facts)))

    def figure(self) -> Any:
        shown = [entry for entry in self.entries if entry.curve]
        figure = new_figure(11, 5)
        roles = ("known", "unseen") if _has_unseen(shown) else ("known",)
        figure.suptitle(f"{self.targets:,} failures to repair\n{LEGEND}", color=INK, fontsize=10)
        panels = figure.subplots(1, len(roles), squeeze=False)[0]
        for axes, role in zip(panels, roles, strict=True):
            _panel(axes, role, shown)
        if shown:
            figure.legend(
                *panels[0].get_legend_handles_labels(),
                loc="outside lower center",
                ncols=5,
                frameon=False,
            )
        return figure

    def __getitem__(self, method: str) -> Entry:
        """Returns the entry of a method. For an unknown name, a `ConfigurationError` suggests the
        nearest name.
        """
        found = {entry.method: entry for entry in self.entries}
        check_choice("method", method, tuple(found))
        return found[method]

    def to_csv(self) -> str:
        """Returns a table with a line for every point of every curve, and for every `scaled` point."""
        out = io.StringIO()
        names = ("repaired", "broken", "n")
        columns = ("method", "weights", "strength", "seconds", "targeted")
        table = csv.writer(out, lineterminator="\n")
        table.writerow(
            (
                *columns,
                *(f"{role}_{name}" for role in ("known", "unseen") for name in names),
                "gain",
            )
        )
        for entry in self.entries:
            lines = [
                ("given" if point is entry.given else "curve", entry.seconds, point)
                for point in entry.curve
            ]
            if entry.scaled is not None:
                lines.append(("scaled", entry.seconds + entry.scaling, entry.scaled))
            for kind, seconds, point in lines:
                counts = (
                    getattr(flips, name) for flips in (point.known, point.unseen) for name in names
                )
                start = (
                    entry.method,
                    kind,
                    f"{point.strength:g}",
                    f"{seconds:.2f}",
                    point.targeted,
                )
                table.writerow((*start, *counts, f"{point.gain:.3f}"))
        return out.getvalue()

    def save(self, folder: str | Path) -> None:
        """Writes `comparison.json`, `comparison.csv` and `comparison.md` to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for kind, text in (
            ("json", self.to_json()),
            ("csv", self.to_csv()),
            ("md", self.to_markdown()),
        ):
            write_text(folder / f"comparison.{kind}", text)


SCALED_NOTE = (
    "Scaled to t: the weights w0 + t (w - w0) at the largest t found to break no known sample."
)


def _summary(comparison: Comparison, shown: Sequence[Entry]) -> str:
    text = f"{plural(comparison.targets, 'failure')} to repair"
    if not shown:
        return f"{text}; no method found new weights."
    first = shown[0].curve[0]
    text += f", {first.known.passed:,} of {first.known.n:,} known samples right before"
    if first.unseen.n:
        text += f", {first.unseen.passed:,} of {first.unseen.n:,} unseen ones"
    return f"{text}."


def _table(comparison: Comparison, shown: Sequence[Entry]) -> Table:
    with_unseen = _has_unseen(shown)
    columns = [
        ("repaired", f"of {comparison.targets:,}"),
        ("repaired", "known"),
        ("broken", "known"),
    ]
    if with_unseen:
        columns += [("repaired", "unseen"), ("broken", "unseen"), ("accuracy", "points")]

    def row(label: str, seconds: float, point: CurvePoint) -> Row:
        texts = list(map(count, (point.targeted, point.known.repaired, point.known.broken)))
        if with_unseen:
            texts += [
                count(point.unseen.repaired),
                count(point.unseen.broken),
                f"{point.gain:+.1f}",
            ]
        return Row(label, (*texts, f"{seconds:,.1f}"))

    rows = []
    for entry in shown:
        rows.append(row(entry.method, entry.seconds, entry.curve[-1]))
        if entry.scaled is not None and entry.scaled.strength < 1:
            label = f"  scaled to {entry.scaled.strength:.2f}"
            rows.append(row(label, entry.seconds + entry.scaling, entry.scaled))
    return Table((*columns, ("time", "s")), tuple(rows))


def _has_unseen(shown: Sequence[Entry]) -> bool:
    return any(entry.curve[0].unseen.n for entry in shown)


LEGEND = (
    "Dot: result of a method; ring: scaled back until no known sample is broken; dashed: a baseline; "
    "thin line: as many broken as repaired"
)


def _panel(axes: Any, role: str, entries: Sequence[Entry]) -> None:
    def place(point: CurvePoint) -> tuple[int, int]:
        counts: FlipCounts = getattr(point, role)
        return counts.broken, counts.repaired

    curves = [[place(point) for point in entry.curve] for entry in entries]
    right = 1.12 * max([1, *(curve[-1][0] for curve in curves)])
    top = 1.12 * max([1, *(y for curve in curves for x, y in curve if x <= right)])
    axes.plot([0, top], [0, top], color="#BBBBBB", linewidth=0.8, zorder=0)
    for i, (entry, curve) in enumerate(zip(entries, curves, strict=True)):
        colour = PALETTE[i % len(PALETTE)]
        if all(x <= right for x, _ in curve):  # the curve of a retrained network leaves the panel
            style = "--" if entry.method in BASELINES else "-"
            axes.plot(*zip(*curve, strict=True), color=colour, linestyle=style, linewidth=1.6)
        label = escape_dollars(entry.method)
        axes.plot(*curve[-1], "o", color=colour, markersize=6, clip_on=False, zorder=3, label=label)
        if entry.scaled is not None and 0 < entry.scaled.strength < 1:
            ring = {
                "markerfacecolor": "white",
                "markeredgecolor": colour,
                "markersize": 9,
            }  # visible around a dot
            axes.plot(*place(entry.scaled), "o", **ring, clip_on=False, zorder=2.5)
    axes.set_xlim(-0.02 * right, right)  # keeps dots at 0 off the axis
    axes.set_ylim(0, top)
    axes.set_title(f"{role} samples", color=INK, fontsize=10, loc="left")
    label_axes(axes, "broken (was right, now wrong)", "repaired (was wrong, now right)")
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
