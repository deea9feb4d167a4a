"""Compares methods and baselines on one problem: counts, page and figure."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from lightning_nrl._utils.atomic_files import write_text
from lightning_nrl._utils.formatting import plural
from lightning_nrl._utils.preserve import preserve_state
from lightning_nrl._utils.registry import Registry
from lightning_nrl._utils.timing import Observer, StageTimer
from lightning_nrl.analysis.baselines import BASELINES, Interpolation
from lightning_nrl.data import Source
from lightning_nrl.errors import (
    ConfigurationError,
    EmptyLocalizationError,
    EvaluationError,
    OtherRankError,
    ReplayError,
    check_choice,
)
from lightning_nrl.evaluation import Evaluator, FlipCounts, Flips, SampleOptions
from lightning_nrl.evaluation.layers import find_scope, layer_names
from lightning_nrl.evaluation.stats import pareto_front
from lightning_nrl.methods import METHODS, AnyMethod, Problem, Solution, Training, solve
from lightning_nrl.pipeline import Settings
from lightning_nrl.pipeline.baseline import EvaluatedData, evaluate_baseline
from lightning_nrl.pipeline.input_checks import check_sources, check_targets, given_or_default
from lightning_nrl.pipeline.problem_builder import build_problem
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Comparison", "CurvePoint", "Entry", "Methods", "compare_module"]

COMPARED_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
SCALING_STEP = 1 / 64  # the bisection for a strength stops at this distance
NOTHING_UNSEEN = FlipCounts(0, 0, 0, 0)

ALL_METHODS: Registry[AnyMethod] = Registry(
    METHODS.kind, METHODS.example, METHODS.fits, include=(METHODS, BASELINES)
)
COMPARED_BY_DEFAULT = ("auto", "finetune-polish", "convex", "swarm", *BASELINES)
"""Methods that a comparison runs by default."""

Methods = Sequence[str | AnyMethod] | Mapping[str, str | AnyMethod]
"""Methods and baselines, by name or as objects. A mapping's keys are names in the results."""
Role = Literal["known", "unseen"]


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
    settings = given_or_default(settings)
    evaluator = Evaluator.of(model)
    model = evaluator.model
    methods_by_name = parse_methods(methods)
    check_sources(known, unseen, settings)
    layers = find_scope(
        model, settings.layer, include_bias=settings.localizer.include_bias, called=evaluator.called
    )
    with preserve_state(model):
        collecting = StageTimer(observer)
        # Without slices, quotas and label checks, which the comparison does not count.
        plain = replace(settings, samples=SampleOptions(importance=settings.samples.importance))
        baseline = evaluate_baseline(evaluator, known, plain, unseen=unseen, clock=collecting)
        check_targets(baseline.before, settings)
        problem = build_problem(evaluator, known, baseline, layers, settings, training=training)
        unseen_data = baseline.other_data.get("unseen")
        evaluated = [baseline.known]
        if unseen_data is not None:
            evaluated.append(unseen_data.before)
        entries = []
        runs: list[_Run] = []
        for name, method in methods_by_name.items():
            with preserve_state(model):
                torch.manual_seed(settings.seed)
                clock = StageTimer(observer, settings.max_time)
                clock.seconds.update(collecting.seconds)  # methods estimate passes from it
                runs.append(_run_method(method, replace(problem, clock=clock), runs))
                entries.append(_entry(problem, unseen_data, name, runs[-1]))
    return Comparison(
        tuple(entries),
        int(problem.before.targeted.sum()),
        str(settings.target),
        ", ".join(layer_names(settings.layer)),
        settings.seed,
        provenance=Provenance.of(model, *evaluated),
    )


def parse_methods(methods: Methods | None) -> dict[str, AnyMethod]:
    """Returns methods by name. Raises `ConfigurationError` if one is unknown or given twice."""
    if methods is None:
        methods = COMPARED_BY_DEFAULT
    if isinstance(methods, str):
        methods = (methods,)
    if not isinstance(methods, (Mapping, Sequence)):
        raise ConfigurationError(
            f"`methods={methods!r}` is no list.", "give a list of names or of objects."
        )
    names = list(map(_name, methods))
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(
            f"`methods` are {names}.",
            "name each method once; the keys of a mapping are names of methods.",
        )
    if isinstance(methods, Mapping):
        methods = list(methods.values())
    parsed = [ALL_METHODS.parse("methods", method) for method in methods]
    return dict(zip(names, parsed, strict=True))


def _name(method: str | AnyMethod) -> str:
    if isinstance(method, str):
        return method
    return type(method).__name__


class _Run(NamedTuple):
    method: AnyMethod
    solution: Solution
    seconds: float


def _run_method(method: AnyMethod, problem: Problem, earlier: Sequence[_Run]) -> _Run:
    """Runs and times a method. An `Interpolation` reuses the earlier run of its method `new`."""
    start = time.perf_counter()
    if isinstance(method, Interpolation):
        for run in earlier:
            if run.method == method.new:
                solution = method.towards(problem, run.solution)
                return _Run(method, solution, run.seconds + time.perf_counter() - start)
    try:
        solution = solve(method, problem)
    except OtherRankError:
        raise  # the other rank has stopped
    except (ConfigurationError, EmptyLocalizationError, ReplayError, EvaluationError) as error:
        solution = Solution(None, error.problem)
    return _Run(method, solution, time.perf_counter() - start)


def _entry(problem: Problem, unseen: EvaluatedData | None, name: str, run: _Run) -> Entry:
    solution = run.solution
    if solution.proposal is None:
        return Entry(name, run.seconds, note=solution.reason)
    path = PatchPath(problem, solution.proposal.state)
    unseen_before = NOTHING_UNSEEN
    if unseen is not None:
        unseen_before = Flips.between(unseen.before, unseen.before).counts()
    known_before = FlipCounts.of(problem.before.right, problem.before.right)
    curve = [CurvePoint(0.0, 0, known_before, unseen_before)]
    for point in path.count(COMPARED_STRENGTHS):
        curve.append(_point(path, unseen, point))
    start = time.perf_counter()
    scaled = _scale_back(path, unseen, curve)
    scaling = time.perf_counter() - start
    note = ""
    if solution.steps:
        note = solution.steps[-1].note
    return Entry(name, run.seconds, tuple(curve), scaled, scaling, note)


def _scale_back(
    path: PatchPath, unseen: EvaluatedData | None, curve: Sequence[CurvePoint]
) -> CurvePoint:
    """Bisects for the largest strength that breaks no known sample.

    Assumes that a larger strength always breaks more.
    """
    best = [point for point in curve if not point.known.broken][-1]
    bottom = top = best.strength
    if best is not curve[-1]:
        top = curve[curve.index(best) + 1].strength
    while top - bottom > SCALING_STEP:
        middle = (bottom + top) / 2
        if path.point(middle).known.broken:
            top = middle
        else:
            bottom = middle
    if bottom == best.strength:
        return best
    return _point(path, unseen, path.point(bottom))


def _point(path: PatchPath, unseen: EvaluatedData | None, counted: StrengthPoint) -> CurvePoint:
    unseen_counts = NOTHING_UNSEEN
    if unseen is not None:
        unseen_counts = unseen.flips(path.problem.evaluator, path.state(counted.strength)).counts()
    return CurvePoint(counted.strength, counted.repaired_in_target, counted.known, unseen_counts)


@dataclass(frozen=True)
class CurvePoint:
    """Counts under the weights w0 + strength (w - w0): w0 before a method and w after it."""

    strength: float
    targeted: int  # number of repaired targets
    known: FlipCounts
    unseen: FlipCounts

    def counts(self, role: Role) -> FlipCounts:
        if role == "unseen":
            return self.unseen
        return self.known


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
        if self.curve:
            return self.curve[-1]
        return None

    @property
    def scaled_back(self) -> CurvePoint | None:
        """`scaled` of a method that breaks known samples; None if it needs no scaling."""
        if self.scaled is None or self.scaled.strength >= 1:
            return None
        return self.scaled


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
        shown = self._shown
        blocks: list[Block] = [Heading("Comparison", 1), Text(_summary(self, shown))]
        if shown:
            names = ", ".join(entry.method for entry in self.pareto())
            blocks += [_table(self, shown), Text(FRONT_NOTE.format(names))]
        if any(entry.scaled_back for entry in shown):
            blocks.append(Text(SCALED_NOTE))
        left_out = [(entry.method, entry.note) for entry in self.entries if not entry.curve]
        if left_out:
            blocks += [Heading("Left out"), FactList(left_out)]
        facts = (("target", self.target), ("layer", self.layer), ("seed", str(self.seed)))
        return Page((*blocks, FactList(facts)))

    @property
    def _shown(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.curve]

    def pareto(self) -> tuple[Entry, ...]:
        """Returns the Pareto front on unseen data (few broken, many points), fewest broken first.

        Without unseen data, known data count.
        """
        return pareto_front(
            self._shown, lambda entry: _judged(entry).broken, lambda entry: _judged(entry).points
        )

    def figure(self) -> Figure:
        shown = self._shown
        figure = new_figure(11, 5)
        figure.suptitle(f"{self.targets:,} failures to repair\n{LEGEND}", color=INK, fontsize=10)
        roles: list[Role] = ["known"]
        if _has_unseen(shown):
            roles.append("unseen")
        panels = figure.subplots(1, len(roles), squeeze=False)[0]
        for axes, role in zip(panels, roles, strict=True):
            _panel(axes, role, shown)
        ends = [_judged(entry) for entry in self.pareto()]
        x, y = [end.broken for end in ends], [end.repaired for end in ends]
        panels[-1].plot(x, y, color=INK, linestyle=":", linewidth=1, zorder=1)
        if shown:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        return figure

    def __getitem__(self, method: str) -> Entry:
        """Returns the entry of a method. An error for an unknown name suggests the nearest name."""
        entries = {entry.method: entry for entry in self.entries}
        check_choice("method", method, entries)
        return entries[method]

    def to_csv(self) -> str:
        """Returns a table with a line for every point of a curve, and for every `scaled` point."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(CSV_COLUMNS)
        for entry in self.entries:
            for point in entry.curve:
                weights = "given" if point is entry.given else "curve"
                table.writerow(_csv_line(entry.method, weights, entry.seconds, point))
            if entry.scaled is not None:
                seconds = entry.seconds + entry.scaling
                table.writerow(_csv_line(entry.method, "scaled", seconds, entry.scaled))
        return text.getvalue()

    def save(self, folder: str | Path) -> None:
        """Writes `comparison.json`, `comparison.csv` and `comparison.md` to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "comparison.json", self.to_json())
        write_text(folder / "comparison.csv", self.to_csv())
        write_text(folder / "comparison.md", self.to_markdown())


CSV_COLUMNS = (
    "method",
    "weights",
    "strength",
    "seconds",
    "targeted",
    "known_repaired",
    "known_broken",
    "known_n",
    "unseen_repaired",
    "unseen_broken",
    "unseen_n",
    "gain",
)


def _csv_line(method: str, weights: str, seconds: float, point: CurvePoint) -> tuple[object, ...]:
    known, unseen = point.known, point.unseen
    return (
        method,
        weights,
        f"{point.strength:g}",
        f"{seconds:.2f}",
        point.targeted,
        known.repaired,
        known.broken,
        known.n,
        unseen.repaired,
        unseen.broken,
        unseen.n,
        f"{unseen.points:.3f}",
    )


FRONT_NOTE = "No other method gains as many points and breaks no more: {}."
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
        known, unseen = point.known, point.unseen
        cells = [f"{point.targeted:,}", f"{known.repaired:,}", f"{known.broken:,}"]
        if with_unseen:
            cells += [f"{unseen.repaired:,}", f"{unseen.broken:,}", f"{unseen.points:+.1f}"]
        return Row(label, [*cells, f"{seconds:,.1f}"])

    rows = []
    front = comparison.pareto()
    for entry in (*front, *(entry for entry in shown if entry not in front)):
        rows.append(row(entry.method, entry.seconds, entry.curve[-1]))
        scaled = entry.scaled_back
        if scaled is not None:
            label = f"  scaled to {scaled.strength:.2f}"
            rows.append(row(label, entry.seconds + entry.scaling, scaled))
    return Table((*columns, ("time", "s")), rows)


def _judged(entry: Entry) -> FlipCounts:
    """Returns the counts of a method's weights on unseen data, or else on known data."""
    end = entry.curve[-1]
    return end.unseen if end.unseen.n else end.known


def _has_unseen(shown: Sequence[Entry]) -> bool:
    return any(entry.curve[0].unseen.n for entry in shown)


LEGEND = (
    "Dot: result of a method; ring: scaled back until no known sample is broken; dashed: a "
    "baseline\nthin line: as many broken as repaired; dotted: none gains more and breaks no more"
)


def _panel(axes: Axes, role: Role, entries: Sequence[Entry]) -> None:
    right = 1.0
    for entry in entries:
        right = max(right, entry.curve[-1].counts(role).broken)
    right *= 1.12
    top = 1.0
    for entry in entries:
        for point in entry.curve:
            flips = point.counts(role)
            if flips.broken <= right:
                top = max(top, flips.repaired)
    top *= 1.12
    axes.plot([0, top], [0, top], color="#BBBBBB", linewidth=0.8, zorder=0)
    for i, entry in enumerate(entries):
        _draw_entry(axes, role, entry, PALETTE[i % len(PALETTE)], right)
    axes.set_xlim(-0.02 * right, right)  # keeps dots at 0 off the axis
    axes.set_ylim(0, top)
    axes.set_title(f"{role} samples", color=INK, fontsize=10, loc="left")
    label_axes(axes, "broken (was right, now wrong)", "repaired (was wrong, now right)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(integer=True)


def _draw_entry(axes: Axes, role: Role, entry: Entry, colour: str, right: float) -> None:
    x, y = [], []
    for point in entry.curve:
        flips = point.counts(role)
        x.append(flips.broken)
        y.append(flips.repaired)
    if max(x) <= right:  # the curve of a retrained network leaves the panel
        style = "--" if entry.method in BASELINES else "-"
        axes.plot(x, y, color=colour, linestyle=style, linewidth=1.6)
    label = escape_dollars(entry.method)
    axes.plot(x[-1], y[-1], "o", color=colour, clip_on=False, zorder=3, label=label)
    scaled = entry.scaled_back
    if scaled is not None and scaled.strength > 0:
        flips = scaled.counts(role)
        axes.plot(
            flips.broken,
            flips.repaired,
            "o",
            markerfacecolor="white",
            markeredgecolor=colour,
            markersize=9,  # visible around a dot
            clip_on=False,
            zorder=2.5,
        )
