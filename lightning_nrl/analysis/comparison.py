"""Methods and baselines beside each other on one problem."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_nrl._utils.preserve import preserve
from lightning_nrl._utils.registry import Registry
from lightning_nrl._utils.timing import Observer, StageTimer
from lightning_nrl.analysis.baselines import BASELINES, Interpolation
from lightning_nrl.analysis.comparison_result import Comparison, CurvePoint, Entry
from lightning_nrl.data.batch import Source
from lightning_nrl.errors import (
    ConfigurationError,
    EmptyLocalizationError,
    EvaluationError,
    OtherRankError,
    ReplayError,
)
from lightning_nrl.evaluation import Evaluator, SampleOptions
from lightning_nrl.evaluation.layers import find_scope, layer_names
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips
from lightning_nrl.methods import METHODS, AnyMethod, Problem, Solution, Training, solve
from lightning_nrl.pipeline.baseline import HeldOut, evaluate_baseline
from lightning_nrl.pipeline.input_checks import check_sources, check_targets, given_or_default
from lightning_nrl.pipeline.problem_builder import build_problem
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.pipeline.strength import PatchPath
from lightning_nrl.report import StrengthPoint

__all__ = ["Comparison", "CurvePoint", "Entry", "Methods", "compare_module", "parse_methods"]

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

    Model and data are as of `repair_module`; nothing is chosen by unseen data. `settings` say what to repair; each
    method has `max_time`. `methods` are names of `METHODS` and `BASELINES`, or objects; None: `COMPARED_BY_DEFAULT`.
    Without `training`, which goes on with the model's own or begins it anew, there is no retraining.

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
        collecting = StageTimer(observer)
        bare = replace(settings, samples=SampleOptions(importance=settings.samples.importance))
        baseline = evaluate_baseline(evaluator, known, bare, unseen=unseen, clock=collecting)
        check_targets(baseline.before, settings)
        problem = build_problem(evaluator, known, baseline.before, layers, settings, training=training)
        later = baseline.held_out.get("unseen")
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
    return Comparison(tuple(entries), int(problem.before.targeted.sum()), str(settings.target), layer, settings.seed)


def parse_methods(methods: Methods | None) -> dict[str, AnyMethod]:
    """Methods by the names that a comparison gives them; a `ConfigurationError` if one is unknown or there twice."""
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
    """Runs a method and measures its time; the far end of an interpolation is not trained a second time."""
    began, earlier = time.perf_counter(), 0.0
    try:
        if isinstance(method, Interpolation):
            ends = [(end, seconds) for other, end, seconds in found if other == method.new]
            end, earlier = ends[0] if ends else (method.new(problem), 0.0)
            solution = method.towards(problem, end)
        else:
            solution = solve(method, problem)
    except OtherRankError:
        raise  # that rank does not go on
    except (ConfigurationError, EmptyLocalizationError, ReplayError, EvaluationError) as error:
        solution = Solution(None, str(error).partition("\n")[0])
    return solution, earlier + time.perf_counter() - began


def _entry(problem: Problem, unseen: HeldOut | None, name: str, solution: Solution, seconds: float) -> Entry:
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
    """Returns the largest strength found to break no known sample, by bisection to within `SCALING_STEP`.

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
    later = NOTHING_UNSEEN
    if unseen is not None:
        later = unseen.flips(path.problem.evaluator, path.state(counted.strength)).counts()
    return CurvePoint(counted.strength, counted.repaired_in_target, counted.known, later)
