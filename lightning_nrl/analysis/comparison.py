"""Methods and baselines beside each other on one problem.

In: a module, known and unseen data, and names of methods. Out: a `Comparison`: what each method repairs and breaks at
several strengths, as data, a page and a figure.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_nrl._utils.preserve import preserve
from lightning_nrl._utils.registry import Registry
from lightning_nrl._utils.timing import Observer, StageTimer
from lightning_nrl.analysis.baselines import BASELINES, Interpolation
from lightning_nrl.analysis.comparison_plot import draw_comparison
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
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips
from lightning_nrl.methods import METHODS, AnyMethod, Problem, Solution, Training, solve
from lightning_nrl.pipeline.baseline import HeldOut, LeakCheck
from lightning_nrl.pipeline.input_checks import check_losses, check_sources, check_targets, given_or_default
from lightning_nrl.pipeline.problem_builder import build_problem
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.pipeline.strength import PatchPath
from lightning_nrl.report import Report, StrengthPoint, installed_versions
from lightning_nrl.report._figures import Plotted
from lightning_nrl.report._formatting import count, plural
from lightning_nrl.report.page import Block, Facts, Heading, Page, Row, Table, Text

__all__ = ["Comparison", "CurvePoint", "Entry", "HeadToHead", "Methods", "compare_module", "parse_methods"]

COMPARED_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
SCALING_STEP = 1 / 64  # of the strength at which weights are scaled back
NOTHING_UNSEEN = FlipCounts(0, 0, 0, 0)

COMPARED_METHODS: Registry[AnyMethod] = Registry(
    METHODS.kind, METHODS.example, METHODS.fits, include=(METHODS, BASELINES)
)
"""Methods and baselines by name."""

COMPARED_BY_DEFAULT = ("auto", "finetune-polish", "convex", "linearized", "swarm", *BASELINES)
"""What a comparison runs where no methods are named."""

Methods = Sequence[str | AnyMethod] | Mapping[str, str | AnyMethod]
"""Names of methods and baselines, or objects, under names of their own if they are a mapping."""


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
    """Runs methods one after the other on the same problem, each from the same weights and with the same seed.

    No gate judges them. What each gives is counted at several strengths between the original and its own weights, and
    at the largest strength that breaks no known sample. The model is left as found.

    Args:
        model: the trained model on its device, as for `repair_module`; it runs in evaluation mode.
        known: data that methods may look at.
        settings: what to repair. Its `max_time` is what each method has; how one repair ends does not matter (`method`,
            `gate`, `strength`, `limit`, `sparse`).
        unseen: data that is only counted: nothing is chosen by it.
        methods: names of `METHODS` and `BASELINES`, or objects; None: `COMPARED_BY_DEFAULT`.
        training: goes on with the training of the model, or begins it anew; without it there is no retraining.
        observer: is told how it goes.

    Raises:
        ConfigurationError: the layer, the data, the target, the task or a method cannot be used, or no failed sample is
            in the target.
        EvaluationError: the original model gives losses that are not finite.
    """
    settings, evaluator = given_or_default(settings), Evaluator.of(model)
    model = evaluator.model
    chosen = parse_methods(methods)
    check_sources(known, unseen, settings)
    include_bias = settings.localizer.include_bias
    layers = find_scope(model, settings.layer, include_bias=include_bias, called=evaluator.called)
    with preserve(model):
        collecting, leaks = StageTimer(observer), LeakCheck(known, {"unseen": unseen})
        with collecting.stage("collect"):
            before, _ = SampleOptions(importance=settings.samples.importance).evaluate(
                evaluator, leaks.known, settings.target
            )
        check_losses(before)
        check_targets(before, settings)
        problem = build_problem(evaluator, known, before, layers, settings, training=training)
        later = HeldOut(unseen, evaluator.run(leaks.held_out["unseen"])) if unseen else None
        leaks.leaked(evaluator.collective)
        entries: list[Entry] = []
        found: list[tuple[AnyMethod, Solution, float]] = []
        for name, method in chosen.items():
            with preserve(model):
                torch.manual_seed(settings.seed)
                clock = StageTimer(observer, settings.max_time)
                clock.seconds.update(collecting.seconds)  # methods keep time for passes over the data by this
                solution, seconds = _solved(method, replace(problem, clock=clock), found)
                found.append((method, solution, seconds))
                entries.append(_entry(problem, later, name, solution, seconds))
    layer = ", ".join(layer_names(settings.layer))
    return Comparison(tuple(entries), int(before.targeted.sum()), str(settings.target), layer, settings.seed)


def parse_methods(methods: Methods | None) -> dict[str, AnyMethod]:
    """Methods by the names that a comparison gives them.

    Raises:
        ConfigurationError: a name is unknown or there twice, or something is no method.
    """
    methods = COMPARED_BY_DEFAULT if methods is None else (methods,) if isinstance(methods, str) else methods
    if not isinstance(methods, (Mapping, Sequence)):
        raise ConfigurationError(f"`methods={methods!r}` is no list.", "give a list of names or of objects.")
    named = isinstance(methods, Mapping)
    names = [str(method) if named or isinstance(method, str) else type(method).__name__ for method in methods]
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(
            f"`methods` are {names}.", "name each once; a mapping gives objects names of their own."
        )
    given = methods.values() if isinstance(methods, Mapping) else methods
    return {name: COMPARED_METHODS.parse("methods", method) for name, method in zip(names, given, strict=True)}


def _solved(
    method: AnyMethod, problem: Problem, found: Sequence[tuple[AnyMethod, Solution, float]]
) -> tuple[Solution, float]:
    """What a method gives and how long it takes; the far end of an interpolation is not trained a second time."""
    began, earlier = time.perf_counter(), 0.0
    known = [
        (end, seconds) for other, end, seconds in found if isinstance(method, Interpolation) and other == method.new
    ]
    try:
        if isinstance(method, Interpolation) and known:
            end, earlier = known[0]
            solution = method.towards(problem, end)
        else:
            solution = solve(method, problem)
    except OtherRankError:
        raise  # that rank does not go on
    except (ConfigurationError, EmptyLocalizationError, ReplayError, EvaluationError) as error:
        solution = Solution(None, str(error).partition("\n")[0])
    return solution, earlier + time.perf_counter() - began


def _entry(problem: Problem, unseen: HeldOut | None, name: str, solution: Solution, seconds: float) -> Entry:
    """Counts what a method gave, and what lies between it and the original weights."""
    if solution.proposal is None:
        return Entry(name, seconds, note=solution.reason)
    path = PatchPath(problem, solution.proposal.state)
    later = NOTHING_UNSEEN if unseen is None else Flips.between(unseen.before, unseen.before).counts()
    start = CurvePoint(0.0, 0, Flips.between(problem.before, problem.before).counts(), later)
    curve = (start, *(_point(path, unseen, point) for point in path.count(COMPARED_STRENGTHS)))
    began = time.perf_counter()
    scaled = _scaled(path, unseen, curve)
    note = solution.steps[-1].note if solution.steps else ""
    return Entry(name, seconds, curve, scaled, time.perf_counter() - began, note)


def _scaled(path: PatchPath, unseen: HeldOut | None, curve: Sequence[CurvePoint]) -> CurvePoint:
    """The largest strength found to break no known sample, by bisection to within `SCALING_STEP`.

    Counts need not rise with the strength, so a larger one may be missed; this one was counted.
    """
    low = [point for point in curve if not point.known.broken][-1]
    above = [point.strength for point in curve if point.strength > low.strength]
    bottom, top = low.strength, above[0] if above else low.strength
    while top - bottom > SCALING_STEP:
        middle = (bottom + top) / 2
        bottom, top = (bottom, middle) if path.point(middle).known.broken else (middle, top)
    return low if bottom == low.strength else _point(path, unseen, path.point(bottom))


def _point(path: PatchPath, unseen: HeldOut | None, counted: StrengthPoint) -> CurvePoint:
    """A point of the curve, counted on unseen data too."""
    later = NOTHING_UNSEEN
    if unseen is not None:
        later = unseen.flips(path.problem.evaluator, path.state(counted.strength)).counts()
    return CurvePoint(counted.strength, counted.repaired_in_target, counted.known, later)


@dataclass(frozen=True)
class CurvePoint:
    """A method's weights at one strength, counted by a forward pass of the deployed model.

    Attributes:
        strength: t of w0 + t (w - w0); 0 is the original, 1 what the method gave.
        targeted: failures to be repaired that pass.
        known: what became of all known samples.
        unseen: what became of samples that no method looked at.
    """

    strength: float
    targeted: int
    known: FlipCounts
    unseen: FlipCounts

    @property
    def gain(self) -> float:
        """The change of accuracy on unseen data in points, that is hundredths; NaN without such data."""
        return 100 * (self.unseen.repaired - self.unseen.broken) / self.unseen.n if self.unseen.n else math.nan


@dataclass(frozen=True)
class Entry:
    """What came of one method.

    Attributes:
        method: its name.
        seconds: wall time until it gave its weights.
        curve: its weights at rising strengths from 0, the last as it gave them; empty if it gave none.
        scaled: the weights at the largest strength that was found to break no known sample, as they are if they break
            none; None if the method gave none.
        scaling: seconds that the search for this strength took.
        note: what the method says of its result, or why there is none.
    """

    method: str
    seconds: float
    curve: tuple[CurvePoint, ...] = ()
    scaled: CurvePoint | None = None
    scaling: float = 0.0
    note: str = ""

    @property
    def given(self) -> CurvePoint | None:
        """The weights as the method gave them."""
        return self.curve[-1] if self.curve else None

    def broken_at(self, repaired: float) -> float:
        """How many unseen samples break where so many are repaired, by straight lines between points of the curve.

        Where the curve is at that height more than once, the fewest; NaN where it never is.
        """
        ends = [(point.unseen.repaired, point.unseen.broken) for point in self.curve]
        found = [float(x) for y, x in ends if y == repaired]
        for (y, x), (y_next, x_next) in pairwise(ends):
            if min(y, y_next) < repaired < max(y, y_next):
                found.append(x + (x_next - x) * (repaired - y) / (y_next - y))
        return min(found, default=math.nan)


@dataclass(frozen=True)
class HeadToHead:
    """A method at one strength, and another method where that repairs as many unseen samples.

    Attributes:
        method: the first method.
        point: its weights at one strength.
        broken: unseen samples that the other breaks for as many repaired ones; NaN if it never repairs as many.
    """

    method: str
    point: CurvePoint
    broken: float

    @property
    def fewer(self) -> bool:
        """Whether the other breaks fewer."""
        return self.broken < self.point.unseen.broken


@dataclass(frozen=True)
class Comparison(Report, Plotted):
    """Several methods on one problem. `rich.print(comparison)` shows it as a table.

    Attributes:
        entries: one a method, in the order in which they ran.
        targets: failures that were to be repaired.
        target: which these are, in words.
        layer: what was to be changed, as it was asked for.
        seed: of everything random.
        versions: versions of the software by name.
    """

    entries: tuple[Entry, ...]
    targets: int
    target: str
    layer: str
    seed: int
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    def page(self, full: bool = False) -> Page:
        return page_of_comparison(self)

    def figure(self) -> Any:
        return draw_comparison(self)

    def __getitem__(self, method: str) -> Entry:
        """The entry of a method.

        Raises:
            ConfigurationError: it is not there; the nearest name is given.
        """
        found = {entry.method: entry for entry in self.entries}
        check_choice("method", method, tuple(found))
        return found[method]

    def head_to_head(self, method: str) -> tuple[HeadToHead, ...]:
        """A method beside every other one at each point of that one's curve, at equal unseen repaired."""
        own = self[method]
        return tuple(
            HeadToHead(entry.method, point, own.broken_at(point.unseen.repaired))
            for entry in self.entries
            if entry.method != method
            for point in entry.curve[1:]
        )

    def to_csv(self) -> str:
        """A line for every point of every curve, and one for the weights scaled back."""
        out = io.StringIO()
        names = ("repaired", "broken", "n")
        columns = ("method", "weights", "strength", "seconds", "targeted")
        table = csv.writer(out, lineterminator="\n")
        table.writerow((*columns, *(f"{role}_{name}" for role in ("known", "unseen") for name in names), "gain"))
        for entry in self.entries:
            lines = [("given" if point is entry.given else "curve", entry.seconds, point) for point in entry.curve]
            if entry.scaled is not None:
                lines.append(("scaled", entry.seconds + entry.scaling, entry.scaled))
            for kind, seconds, point in lines:
                counts = (getattr(flips, name) for flips in (point.known, point.unseen) for name in names)
                start = (entry.method, kind, f"{point.strength:g}", f"{seconds:.2f}", point.targeted)
                table.writerow((*start, *counts, f"{point.gain:.3f}"))
        return out.getvalue()

    def save(self, folder: str | Path) -> None:
        """Writes `comparison.json`, `comparison.csv` and `comparison.md` to a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for kind, text in (("json", self.to_json()), ("csv", self.to_csv()), ("md", self.to_markdown())):
            (folder / f"comparison.{kind}").write_text(text, encoding="utf-8")


SCALED_NOTE = "Scaled to t: the weights w0 + t (w - w0) at the largest t found to break no known sample."


def page_of_comparison(comparison: Comparison) -> Page:
    """One line a method, and where it breaks known samples a second one for its weights scaled back until none is."""
    shown = [entry for entry in comparison.entries if entry.curve]
    blocks: list[Block] = [Heading("Comparison", 1), Text(_summary(comparison))]
    if shown:
        blocks.append(_table(comparison, shown))
        if any(len(_lines(entry)) > 1 for entry in shown):
            blocks.append(Text(SCALED_NOTE))
    left_out = tuple((entry.method, entry.note) for entry in comparison.entries if not entry.curve)
    if left_out:
        blocks += [Heading("Left out"), Facts(left_out)]
    facts = (("target", comparison.target), ("layer", comparison.layer), ("seed", str(comparison.seed)))
    return Page((*blocks, Facts(facts)))


def _summary(comparison: Comparison) -> str:
    text = f"{plural(comparison.targets, 'failure')} to repair"
    first = next((entry.curve[0] for entry in comparison.entries if entry.curve), None)
    if first is None:
        return f"{text}; no method gave new weights."
    text += f", {first.known.passed:,} of {first.known.n:,} known samples right before"
    if first.unseen.n:
        text += f", {first.unseen.passed:,} of {first.unseen.n:,} unseen ones"
    return f"{text}."


def _table(comparison: Comparison, entries: list[Entry]) -> Table:
    with_unseen = any(entry.curve[0].unseen.n for entry in entries)
    columns = [("repaired", f"of {comparison.targets:,}"), ("repaired", "known"), ("broken", "known")]
    if with_unseen:
        columns += [("repaired", "unseen"), ("broken", "unseen"), ("accuracy", "points")]
    rows = []
    for entry in entries:
        for label, seconds, point in _lines(entry):
            texts = list(map(count, (point.targeted, point.known.repaired, point.known.broken)))
            if with_unseen:
                texts += [count(point.unseen.repaired), count(point.unseen.broken), f"{point.gain:+.1f}"]
            rows.append(Row(label, (*texts, f"{seconds:,.1f}")))
    return Table((*columns, ("time", "s")), tuple(rows))


def _lines(entry: Entry) -> list[tuple[str, float, CurvePoint]]:
    given, scaled = entry.curve[-1], entry.scaled
    lines = [(entry.method, entry.seconds, given)]
    if scaled is not None and scaled.strength < 1:
        lines.append((f"  scaled to {scaled.strength:.2f}", entry.seconds + entry.scaling, scaled))
    return lines
