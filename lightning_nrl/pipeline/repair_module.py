"""Runs the stages of a repair: baseline, method, sparse patch, line search, gate, report.

The model stays unchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import twice_if_out_of_memory
from lightning_nrl._utils.formatting import plural
from lightning_nrl._utils.preserve import loading_mode, preserve_state
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl._utils.state import State, changed, current_state, write
from lightning_nrl._utils.timing import Observer, StageTimer
from lightning_nrl.data import Source
from lightning_nrl.data.sample_identity import read_keys
from lightning_nrl.errors import DeviceMemoryError, EmptyLocalizationError, NotRepairedWarning
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults, TargetCounts
from lightning_nrl.evaluation.slices import required_repairs
from lightning_nrl.evaluation.stats import limit_after
from lightning_nrl.gate import Gate, GateDecision, check_protected, judge
from lightning_nrl.methods import Auto, Problem, Proposal, Solution, Training, better, solve
from lightning_nrl.methods.budget import JUDGING_PASSES, POLISH_PASSES, QUOTA_ROUNDS
from lightning_nrl.methods.lora import LoraAdapter
from lightning_nrl.methods.near_copies import has_near_copies
from lightning_nrl.methods.solvers.polish import polished
from lightning_nrl.pipeline.baseline import Baseline, evaluate_baseline
from lightning_nrl.pipeline.input_checks import (
    check_limit,
    check_sources,
    given_or_default,
    scope_of,
)
from lightning_nrl.pipeline.loaded_weights import to_be_loaded
from lightning_nrl.pipeline.problem_builder import build_problem, origin_of, passed_rows
from lightning_nrl.pipeline.report_builder import ReportBuilder
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.pipeline.sparse_patch import sparsify
from lightning_nrl.pipeline.strength import line_search
from lightning_nrl.records import CalibrationBounds, Step
from lightning_nrl.release.suite import RegressionSuite, protecting, rows_of
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SampleView
from lightning_nrl.updates import Reference


@dataclass(frozen=True)
class Outcome:
    """The result of a repair.

    Attributes:
        report: the report, whose `status` says how the repair ended.
        parameters: the changed parameters and buffers, whole tensors by state-dict name. None if
            not accepted.
        evaluated: `parameters` as they are in evaluation mode, in which `eval()` may have merged
            LoRA weights.
        changes: new minus old values of changed floating-point tensors by name, on the CPU, even if
            refused. None if nothing changed.
        views: inputs of flipped samples, as pictures or text, to show with the report.
        adapter: low-rank adapters that make the same change. None if the method moved no adapters,
            or its result is not accepted.
    """

    report: RepairReport
    parameters: State | None = None
    evaluated: State | None = None
    changes: State | None = None
    views: tuple[SampleView, ...] = ()
    adapter: LoraAdapter | None = None

    @property
    def change(self) -> Tensor | None:
        """The values in `changes` that are not 0, in one vector. None if `changes` is None."""
        if self.changes is None:
            return None
        changes = torch.cat([change.flatten() for change in self.changes.values()])
        return changes[changes != 0]

    def write(self, model: nn.Module) -> bool:
        """Copies the repaired weights into a model of the same kind, on any device.

        Returns False if there are none. Raises a `ConfigurationError`, before any change, if a
        tensor is missing in the model or has another shape.
        """
        if self.parameters:
            with loading_mode(model):
                write(model, self.parameters)
        return bool(self.parameters)


def repair_module(
    model: nn.Module | Evaluator,
    known: Sequence[Source],
    settings: Settings | None = None,
    *,
    unseen: Sequence[Source] = (),
    calibration: Sequence[Source] = (),
    training: Training | None = None,
    reference: Reference | None = None,
    suite: RegressionSuite | None = None,
    observer: Observer | None = None,
    work: ResumeStore | None = None,
    began: float | None = None,
) -> Outcome:
    """Evaluates the model, finds new weights and judges them.

    Leaves the model unchanged; `Outcome.write` changes it.

    Args:
        model: the trained model on its device; it runs in evaluation mode. An `Evaluator` also sets
            the task, mixed precision, and the ranks that share the data. Each rank gets the same
            outcome.
        known: data that the repair may use. The marks `failed` and `passed` are explained in
            `Source`. The gate judges new weights on all known samples.
        settings: what to repair and how. None takes the default settings.
        unseen: data that are only counted, before and after an accepted repair. Their marks are
            ignored.
        calibration: data that only choose the strength (how much of the weight change to make).
            Marks are ignored.
        training: continues the training of the model. If None, methods that train take gradient
            steps of their own.
        reference: knows which samples the replaced model gets right. Then only failures among these
            are repaired.
        suite: samples of known and calibration data that must not break.
        observer: is notified of progress.
        work: saves finished steps and restores the steps that an earlier process saved. If None,
            nothing is saved.
        began: moment of `time.perf_counter` from which `max_time` counts. None takes this call.

    Returns:
        The outcome. If nothing can be repaired, its report says why.

    Raises:
        ConfigurationError: the layer, data, target or task cannot be used, a calibration sample
            is also known, or the data lack a sample of the suite or have another in its place.
        EvaluationError: the original model has NaN or infinite losses. The error names the samples.
        DeviceMemoryError: memory ran out while the original model was evaluated or, with several
            ranks, later. With one rank, the status is `not repaired` if memory runs out later.
    """
    settings = given_or_default(settings)
    evaluator = Evaluator.of(model)
    clock = StageTimer(observer, settings.max_time, began=began)
    evaluator = replace(evaluator, visited=clock.visit)
    check_sources(known, (*calibration, *unseen), settings)
    check_limit(settings, bool(calibration))
    layers = scope_of(settings, evaluator)
    if suite is not None:
        settings = replace(settings, samples=protecting(settings.samples, suite))
    with preserve_state(evaluator.model) as rewritten:
        evaluate = partial(
            evaluate_baseline,
            evaluator,
            known,
            settings,
            unseen=unseen,
            calibration=calibration,
            clock=clock,
            reference=reference,
            records=True,
        )
        alone = evaluator.collective.world_size == 1
        baseline = twice_if_out_of_memory(evaluate, "the data were counted", alone=alone)
        if suite is not None:
            tables = [baseline.known]
            if calibration:
                tables.append(baseline.other_data["calibration"].before)
            has_keys = any(entry.key for entry in suite.samples.values())
            keys = read_keys((*known, *calibration), evaluator.collective) if has_keys else []
            rows_of("suite", suite.samples, SampleResults.concat(tables), keys)
        space, _ = layers
        sources = {source.split: source for source in (*known, *calibration, *unseen)}
        builder = ReportBuilder(evaluator, space, settings, sources, baseline, clock)
        if not baseline.before.targeted.any():
            reason = _nothing_targeted(baseline, known, settings)
            return Outcome(builder.without_candidate("nothing to repair", reason))
        quotas, impossible = required_repairs(baseline.before, settings.samples.quotas or {})
        problem = build_problem(
            evaluator,
            known,
            baseline,
            layers,
            settings,
            clock=clock,
            training=training,
        )
        problem = replace(problem, needed=quotas)
        obstacle = impossible or _nothing_passes(problem)
        if obstacle:
            return _give_up(builder, obstacle)
        if work is not None:
            origin = origin_of(problem, baseline, settings)
            work.begin(origin, clock, evaluator.collective, problem.device)
            problem = replace(problem, work=work)
        return _repair(problem, builder, rewritten)


def _repair(problem: Problem, builder: ReportBuilder, rewritten: Mapping[int, Tensor]) -> Outcome:
    """Solves the problem and judges the result.

    If memory runs out on the only rank, the outcome is `not repaired`.
    """
    alone = problem.collective.world_size == 1
    problem.clock.expect(_expected_seconds(problem, builder.settings))
    try:
        method = partial(_run_method, problem, builder)
        solution = twice_if_out_of_memory(method, "the method ran", alone=alone)
        finish = partial(_finish, problem, solution, builder, rewritten)
        return twice_if_out_of_memory(finish, "the result was judged", alone=alone)
    except EmptyLocalizationError as error:
        return _give_up(builder, str(error), stacklevel=4)
    except DeviceMemoryError as error:
        # If this rank gave up, other ranks would wait for it.
        if not alone:
            raise
        return _give_up(builder, str(error), stacklevel=4)


def _expected_seconds(problem: Problem, settings: Settings) -> dict[str, float]:
    one_pass = problem.clock.one_pass
    judging = JUDGING_PASSES * one_pass
    # The default trains only if the whole network may change.
    may_train = problem.whole_network or not isinstance(settings.method, Auto)
    if not settings.trains or problem.update or not may_train:
        return {"judge": judging}
    training = problem.visits / max(1, len(problem.before)) * one_pass
    return {
        "fit": training,
        "polish": POLISH_PASSES * one_pass,
        "judge": judging,
    }


def _finish(
    problem: Problem, solution: Solution, builder: ReportBuilder, rewritten: Mapping[int, Tensor]
) -> Outcome:
    settings, model = builder.settings, problem.model
    near_copies = solution.held_out is not None and has_near_copies(
        problem, builder.baseline.record
    )
    if settings.bounds.sparse is not None and solution.proposal is not None:
        with problem.clock.stage("sparse"):
            work = partial(sparsify, problem, solution.proposal, settings.bounds.sparse)
            sparse, step = problem.work.once("sparse", work, tuple[Proposal, Step])
        solution = replace(solution, proposal=sparse, steps=(*solution.steps, step))
    builder = replace(builder, solution=solution, near_copies=near_copies)
    proposal = solution.proposal
    patch = changed(model, proposal.state) if proposal is not None else {}
    if proposal is None or not patch:
        reason = solution.reason or "the search found nothing better than the original weights."
        return Outcome(builder.without_candidate("not repaired", reason))
    with problem.clock.stage("strength"):
        result = line_search(
            problem,
            patch,
            settings.gate,
            calibration=builder.baseline.other_data.get("calibration"),
            fixed=settings.bounds.strength,
            limit=settings.limit,
            after=proposal.after,
            may_polish=solution.adapter is None,  # steps on whole weights have no low rank
        )
    builder = replace(builder, line_search=result)
    if result.chosen is None:
        reason = f"no strength is within the limit ({settings.limit})."
        return Outcome(builder.without_candidate("not repaired", reason))
    state, steps = _confirmed(problem, result.state)
    builder = replace(builder, solution=replace(solution, steps=(*solution.steps, *steps)))
    loaded, patch = to_be_loaded(model, changed(model, state), rewritten)
    if not patch:
        # A polish of the weaker patch, `eval()` or rounding has undone the change.
        reason = f"at strength {result.chosen:g} no weight changes."
        return Outcome(builder.without_candidate("not repaired", reason))
    report = _judge(problem, patch, builder)
    changes = _changes(current_state(model), patch)
    if report.status != "repaired":
        return Outcome(report, changes=changes)
    adapter = solution.adapter
    if adapter is not None:
        adapter = adapter.scaled(result.chosen)
        step = _recount_attached(problem, adapter, patch)
        report = replace(report, steps=(*report.steps, step))
    return Outcome(report, loaded, patch, changes, adapter=adapter)


def _changes(old: State, patch: State) -> dict[str, Tensor]:
    """Returns new minus old weights as float32, on the CPU."""
    changes = {}
    for name, new in patch.items():
        if new.is_floating_point():
            exact = torch.promote_types(new.dtype, torch.float32)
            changes[name] = (new.cpu().to(exact) - old[name].cpu()).float()
    return changes


def _confirmed(problem: Problem, state: State) -> tuple[State, tuple[Step, ...]]:
    """Runs the deployed model with weights that were evaluated from the record.

    If it breaks more than the record says and the gate allows, small steps restore that.
    """
    if not problem.record.covers(problem.model, state):
        return state, ()
    with problem.clock.stage("judge"):
        expected = problem.counted("record", state, problem.evaluate(state))
        deployed = problem.counted("judge", state, problem.deployed(state))
    if expected.excess or not deployed.excess or not problem.before.has_margins:
        return state, ()
    problem.record.is_trusted = False
    scope = tuple(name for name in problem.scope if name in state)
    proposal, step, _ = polished(replace(problem, scope=scope), deployed)
    differing = int((deployed.after.passed != expected.after.passed).sum())
    note = f"the model differs from its recorded layer on {plural(differing, 'sample')}"
    return proposal.state, (deployed.step(0.0, note), step)


def _recount_attached(problem: Problem, adapter: LoraAdapter, patch: State) -> Step:
    """Evaluates the adapters beside the old weights, and compares them with the merged weights."""
    began = problem.clock.elapsed
    with problem.clock.stage("judge"):
        merged = problem.deployed(patch)
        with adapter.attached(problem.model):
            after = problem.evaluator.run_with(adapter.state, problem.known)
    differs = (after.prediction != merged.prediction) | (after.passed != merged.passed)
    note = f"beside the old weights; {int(differs.sum()):,} known predictions differ from merged"
    proposal = problem.counted("adapter", adapter.state, after)
    return proposal.step(problem.clock.elapsed - began, note)


def _run_method(problem: Problem, builder: ReportBuilder) -> Solution:
    """Runs the method.

    If it breaks more than `SampleOptions.keep` allows, repeats it and keeps all samples. While
    slices miss quotas and time is left, repeats it with larger weights on their targets.
    """
    settings = builder.settings
    solution = _solved(problem, settings, "method")
    first = solution.proposal
    if first is not None and _breaks_too_many(problem, builder, first.after):
        known = builder.baseline.known
        passed = passed_rows(known, problem.known, settings)
        problem = replace(problem, before=known, passed=passed)
        again = _solved(problem, settings, "method for all samples", ", keeping all")
        if again.proposal is not None:
            solution = replace(again, steps=(*solution.steps, *again.steps))
    if not problem.needed:
        return solution
    for _ in range(QUOTA_ROUNDS):
        best = solution.proposal
        steered = problem.steered(problem.before if best is None else best.after)
        if steered is problem or not problem.deadline.leaves(problem.clock.elapsed):
            break
        problem = steered
        again = _solved(problem, settings, "method for quotas", ", for quotas")
        steps = (*solution.steps, *again.steps)
        if better([best, again.proposal]) is not best:
            solution = again
        solution = replace(solution, steps=steps)
    return solution


def _solved(problem: Problem, settings: Settings, name: str, purpose: str = "") -> Solution:
    """Solves a problem as the step `name`; adds the purpose to the names of the method's steps."""
    work = partial(solve, settings.method, problem)
    solution = problem.work.once(name, work, Solution)
    steps = [replace(step, name=step.name + purpose) for step in solution.steps]
    return replace(solution, steps=steps)


@dataclass(frozen=True)
class _OnePerRegression(Gate):
    """Limits how many samples break that only the new model gets right."""

    rule = "one per repaired regression"

    def allowed(self, counts: FlipCounts) -> int:
        assert isinstance(counts, TargetCounts)
        return counts.repaired_in_target

    def __str__(self) -> str:
        return "one-per-regression"


def _breaks_too_many(
    problem: Problem, builder: ReportBuilder, after: SampleResults
) -> GateDecision | None:
    """Returns a refusal if `keep` is `reference` and more break than regressions are repaired."""
    if not problem.update or builder.settings.samples.keep == "both":
        return None
    decision = judge(builder.baseline.known, after, _OnePerRegression())
    return decision if decision.status == "refused" else None


def _judge(problem: Problem, patch: State, builder: ReportBuilder) -> RepairReport:
    """Evaluates the model with the patch on all data, and decides whether to accept the patch.

    A pass over known data that was made with the same weights is not repeated.
    """
    settings, baseline = builder.settings, builder.baseline
    other_results = {}
    with problem.clock.stage("judge"):
        after = problem.deployed(patch)
        decision = judge(problem.before, after, settings.gate, problem.needed)
        if decision.accepted:
            decision = _breaks_too_many(problem, builder, after) or decision
        if decision.accepted:
            for role, data in baseline.other_data.items():
                other_results[role] = problem.evaluator.run_with(patch, data.sources)
    bounds = None
    if "calibration" in other_results:
        before = baseline.other_data["calibration"].before
        patched = other_results["calibration"]
        decision = check_protected(decision, before, patched)
        if decision.accepted:
            counts = Flips.between(before, patched).counts()
            units, confidence = counts.units, settings.bounds.confidence
            selection = builder.line_search.selection
            bounds = CalibrationBounds(
                units.broken,
                units.passed,
                confidence,
                limit_after(units.broken, units.passed, selection, confidence),
                selection.states,
                selection.allowed,
                by_group=counts.groups is not None,
            )
    return builder.with_candidate(decision, patch, after, other_results, bounds)


def _nothing_passes(problem: Problem) -> str:
    if problem.passed.any():
        return ""
    if not problem.before.passed.any():
        return "no known sample passes, so there is nothing to keep and nothing to compare with."
    names = " and ".join(source.split for source in problem.known if source.passed)
    return f"no sample of {names} passes, so `n_passed` has nothing to draw from."


def _nothing_targeted(baseline: Baseline, known: Sequence[Source], settings: Settings) -> str:
    target = settings.target
    if baseline.update is not None:
        return (
            f"no known sample in the target ({target}) is right under the replaced model "
            "and wrong under the new one."
        )
    results = baseline.known
    names, counts, in_target = [], [], False
    for source in known:
        rows = results.of(source.split)
        counts.append(f"{int((~results.passed[rows]).sum())} in {source.split}")
        if source.failed:
            names.append(source.split)
            in_target |= bool(results.in_target[rows].any())
    splits = " and ".join(names)
    if not in_target:
        return f"no sample of {splits}, right or wrong, is in the target ({target})."
    failures = ", ".join(counts)
    return f"no failed sample of {splits} is in the target ({target}); failures in all: {failures}."


def _give_up(builder: ReportBuilder, reason: str, stacklevel: int = 3) -> Outcome:
    warnings.warn(f"not repaired: {reason}", category=NotRepairedWarning, stacklevel=stacklevel)
    return Outcome(builder.without_candidate("not repaired", reason))
