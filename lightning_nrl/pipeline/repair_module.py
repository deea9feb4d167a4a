"""Runs the stages of a repair: baseline, method, sparse patch, line search, gate, report. The model
stays unchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_nrl._utils.device import twice_if_out_of_memory
from lightning_nrl._utils.preserve import has_own_modes, loading_mode, preserve_state
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl._utils.state import (
    State,
    changed,
    current_state,
    live_tensors,
    snapshot,
    temporary_weights,
    write,
)
from lightning_nrl._utils.timing import Observer, StageTimer
from lightning_nrl.data import Source
from lightning_nrl.errors import DeviceMemoryError, EmptyLocalizationError, NotRepairedWarning
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_scope
from lightning_nrl.evaluation.sample_results import Flips
from lightning_nrl.evaluation.slices import required_repairs
from lightning_nrl.gate import Gate, check_protected, judge
from lightning_nrl.methods import Auto, Problem, Proposal, Solution, Training, better, solve
from lightning_nrl.methods.budget import CURVE_SHARE, JUDGING_PASSES, POLISH_PASSES, QUOTA_ROUNDS
from lightning_nrl.pipeline.baseline import Baseline, evaluate_baseline
from lightning_nrl.pipeline.input_checks import check_limit, check_sources, given_or_default
from lightning_nrl.pipeline.problem_builder import build_problem, origin_of
from lightning_nrl.pipeline.report_builder import ReportBuilder
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.pipeline.sparse_patch import sparsify
from lightning_nrl.pipeline.strength import line_search
from lightning_nrl.records import CalibrationBounds
from lightning_nrl.records.stats import limit_after
from lightning_nrl.records.steps import Step
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SampleView
from lightning_nrl.updates.old_model import Reference


@dataclass(frozen=True)
class Outcome:
    """The result of a repair.

    Attributes:
        report: the report, whose `status` says how the repair ended.
        parameters: the changed parameters and buffers, whole tensors by state-dict name. None if
            not accepted.
        evaluated: `parameters` as they are in evaluation mode, in which `eval()` may have merged
            LoRA weights.
        changes: new minus old values of changed tensors by name, on the CPU, even if refused. None
            if nothing changed.
        views: inputs of flipped samples, as pictures or text, to show with the report.
    """

    report: RepairReport
    parameters: State | None = None
    evaluated: State | None = None
    changes: State | None = None
    views: tuple[SampleView, ...] = ()

    @property
    def change(self) -> Tensor | None:
        """The values in `changes` that are not 0, in one vector. None if `changes` is None."""
        if self.changes is None:
            return None
        flat = torch.cat([change.flatten() for change in self.changes.values()])
        return flat[flat != 0]

    def write(self, model: nn.Module) -> bool:
        """Copies the repaired weights into a model of the same kind, on any device. Returns False
        if
        there are none.

        Raises a `ConfigurationError`, before any change, if a tensor is missing in the model or has
        another shape.
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
    observer: Observer | None = None,
    work: ResumeStore | None = None,
) -> Outcome:
    """Evaluates the model, finds new weights and judges them. Leaves the model unchanged;
    `Outcome.write` changes it.

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
        observer: is notified of progress.
        work: saves finished steps and restores the steps that an earlier process saved. If None,
            nothing is saved.

    Returns:
        The outcome. If nothing can be repaired, its report says why.

    Raises:
        ConfigurationError: the layer, data, target or task cannot be used, or a calibration sample
            is also known.
        EvaluationError: the original model has NaN or infinite losses. The error names the samples.
        DeviceMemoryError: memory ran out while the original model was evaluated or, with several
            ranks, later. With one rank, the status is `not repaired` if memory runs out later.
    """
    settings, evaluator = given_or_default(settings), Evaluator.of(model)
    clock = StageTimer(observer, settings.max_time)
    check_sources(known, (*calibration, *unseen), settings)
    check_limit(settings, bool(calibration))
    layers = find_scope(
        evaluator.model,
        settings.layer,
        include_bias=settings.localizer.include_bias,
        called=evaluator.called,
        trains=settings.trains,
    )
    with preserve_state(evaluator.model) as rewritten:
        evaluate = partial(
            evaluate_baseline,
            evaluator,
            known,
            settings,
            unseen=unseen,
            calibration=calibration,
            clock=clock,
        )
        baseline = twice_if_out_of_memory(
            partial(evaluate, reference=reference),
            "the data were counted",
            alone=evaluator.collective.world_size == 1,
        )
        builder = ReportBuilder(evaluator, layers[0], settings, baseline, clock.seconds)
        if not baseline.before.targeted.any():
            return Outcome(
                builder.without_candidate(
                    "nothing to repair", _nothing_targeted(baseline, known, settings)
                )
            )
        quotas, impossible = required_repairs(baseline.before, settings.samples.quotas or {})
        problem = build_problem(
            evaluator,
            known,
            baseline.before,
            layers,
            settings,
            clock=clock,
            training=training,
            update=baseline.update is not None,
            needed=quotas,
            work=ResumeStore() if work is None else work,
        )
        obstacle = impossible or _nothing_passes(problem)
        if obstacle:
            return _give_up(builder, obstacle)
        if work is not None:
            work.begin(
                origin_of(problem, baseline, settings), clock, evaluator.collective, problem.device
            )
        return _repair(problem, builder, rewritten)


def _repair(problem: Problem, builder: ReportBuilder, rewritten: Mapping[int, Tensor]) -> Outcome:
    """Solves the problem and judges the result. If memory runs out on the only rank, the outcome is
    `not repaired`.
    """
    alone = problem.collective.world_size == 1
    problem.clock.expect(_expected_seconds(problem, builder.settings))
    try:
        method = partial(_run_method, problem, builder.settings)
        solution = twice_if_out_of_memory(method, "the method ran", alone=alone)
        rest = partial(_finished, problem, solution, builder, rewritten)
        return twice_if_out_of_memory(rest, "the result was judged", alone=alone)
    except EmptyLocalizationError as error:
        return _give_up(builder, str(error), stacklevel=4)
    except DeviceMemoryError as error:
        # If this rank gave up, other ranks would wait for it.
        if not alone:
            raise
        return _give_up(builder, str(error), stacklevel=4)


def _expected_seconds(problem: Problem, settings: Settings) -> dict[str, float]:
    one_pass = problem.clock.one_pass
    trains = (
        settings.trains
        and not problem.update
        and (problem.whole or not isinstance(settings.method, Auto))
    )
    training = problem.visits / max(1, len(problem.before)) * one_pass if trains else 0.0
    after = {"strength": CURVE_SHARE * training + one_pass, "judge": JUDGING_PASSES * one_pass}
    return {"fit": training, "polish": POLISH_PASSES * one_pass, **after} if trains else after


def _finished(
    problem: Problem, solution: Solution, builder: ReportBuilder, rewritten: Mapping[int, Tensor]
) -> Outcome:
    settings = builder.settings
    if settings.bounds.sparse is not None and solution.proposal is not None:
        with problem.clock.stage("sparse"):
            work = partial(sparsify, problem, solution.proposal, settings.bounds.sparse)
            sparse, step = problem.work.once("sparse", work, tuple[Proposal, Step])
        solution = replace(solution, proposal=sparse, steps=(*solution.steps, step))
    scored = int(problem.passed.sum()) if solution.n_passed is None else solution.n_passed
    builder = replace(builder, solution=solution, n_passed=scored)
    proposal = solution.proposal
    patch = {} if proposal is None else changed(problem.model, proposal.state)
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
        )
    builder = replace(builder, line_search=result)
    if result.chosen is None:
        reason = f"no strength is within the limit ({settings.limit})."
        return Outcome(builder.without_candidate("not repaired", reason))
    saved, patch = to_be_loaded(problem.model, changed(problem.model, result.state), rewritten)
    if not patch:
        # A polish of the weaker patch, `eval()` or rounding has undone the change.
        reason = f"at strength {result.chosen:g} no weight changes."
        return Outcome(builder.without_candidate("not repaired", reason))
    report = _judged(problem, patch, builder)
    old = current_state(problem.model)
    loaded, evaluated = (saved, patch) if report.status == "repaired" else (None, None)
    return Outcome(report, loaded, evaluated, _changes(old, patch))


def _run_method(problem: Problem, settings: Settings) -> Solution:
    """Runs the method. While slices miss quotas and time is left, repeats it with larger weights on
    their targets.
    """
    solution = problem.work.once("method", partial(solve, settings.method, problem), Solution)
    for _ in range(QUOTA_ROUNDS if problem.needed else 0):
        best, began = solution.proposal, problem.clock.elapsed
        again = problem.steered(problem.before if best is None else best.after)
        if again is problem or not problem.deadline.leaves(began):
            break
        problem = again
        found = problem.work.once(
            "method for quotas", partial(solve, settings.method, problem), Solution
        )
        steps = (
            *solution.steps,
            *(replace(step, name=f"{step.name}, for quotas") for step in found.steps),
        )
        chosen = found if better([best, found.proposal]) is not best else solution
        solution = replace(chosen, steps=steps)
    return solution


def _judged(problem: Problem, patch: State, builder: ReportBuilder) -> RepairReport:
    """Evaluates the model with the patch on all data, decides whether to accept the patch, and
    returns the report.
    """
    settings, baseline = builder.settings, builder.baseline
    with problem.clock.stage("judge"), temporary_weights(problem.model, patch):
        after = problem.evaluator.run(problem.known)
        decision = judge(problem.before, after, settings.gate, problem.needed)
        if decision.accepted and baseline.known is not problem.before:
            # Samples that the replaced model gets wrong may break, but the accuracy on known data
            # must not fall.
            rest = judge(baseline.known, after, Gate.accuracy())
            decision = decision if rest.accepted else rest
        other_data = baseline.other_data.items() if decision.accepted else ()
        later = {role: problem.evaluator.run(data.sources) for role, data in other_data}
    bounds = None
    if "calibration" in later:
        calibration = baseline.other_data["calibration"].before, later["calibration"]
        decision = check_protected(decision, *calibration)
        if decision.accepted:
            selection, confidence = builder.line_search.selection, settings.bounds.confidence
            counts = Flips.between(*calibration).counts()
            upper = limit_after(counts.broken, counts.passed, selection, confidence)
            bound = confidence, upper, selection.states, selection.allowed
            bounds = CalibrationBounds(counts.broken, counts.passed, *bound)
    return builder.with_candidate(decision, patch, after, later, bounds)


def _changes(old: State, new: State) -> State:
    return {name: (new[name].cpu().double() - old[name].cpu().double()).float() for name in new}


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
        return f"no known sample in the target ({target}) is right under the replaced model and wrong under the new one."
    failed = ~baseline.known.passed
    counts = ", ".join(
        f"{int(failed[baseline.known.of(source.split)].sum())} in {source.split}"
        for source in known
    )
    where = " and ".join(source.split for source in known if source.failed)
    if not any(
        baseline.known.in_target[baseline.known.of(source.split)].any()
        for source in known
        if source.failed
    ):
        return f"no sample of {where}, right or wrong, is in the target ({target})."
    return f"no failed sample of {where} is in the target ({target}); failures in all: {counts}."


def _give_up(builder: ReportBuilder, reason: str, stacklevel: int = 3) -> Outcome:
    warnings.warn(f"not repaired: {reason}", category=NotRepairedWarning, stacklevel=stacklevel)
    return Outcome(builder.without_candidate("not repaired", reason))


def to_be_loaded(
    model: nn.Module, patch: dict[str, Tensor], rewritten: Mapping[int, Tensor]
) -> tuple[State, dict[str, Tensor]]:
    """Returns two states: the tensors to load in training mode, and their values after the next
    `eval()`.

    Both are the patch, unless a module overrides `train()` or `eval()`, for instance to merge LoRA
    weights. Then `eval()` rewrites loaded tensors, so the state to load is chosen that `eval()`
    brings closest to the patch. Tensors that do not change are left out. Call this in evaluation
    mode inside `preserve_state`, which yields `rewritten`.
    """
    if not patch or not has_own_modes(model):
        return patch, patch
    evaluated, live = snapshot(model), live_tensors(model)
    model.train()
    # A tensor that `eval()` left alone may have been merged earlier; `train()` has then restored
    # it.
    trained = {
        name: rewritten.get(id(live[name]), x).to(x.device) for name, x in snapshot(model).items()
    }
    _reload(model, trained)
    wanted = {**evaluated, **patch}
    best: tuple[float, State, State] | None = None
    for saved in _candidates(model, snapshot(model), trained, wanted):
        _reload(model, saved)
        found = snapshot(model)
        gap = sum(
            float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted
        )
        if best is None or gap < best[0]:
            best = gap, saved, found
        if not gap:
            break
    assert best is not None
    _reload(model, trained)
    write(model, evaluated)
    held = {name: rewritten.get(id(x), evaluated[name]).to(x.device) for name, x in live.items()}
    return {name: x for name, x in best[1].items() if not torch.equal(x, held[name])}, changed(
        model, best[2]
    )


def _candidates(
    model: nn.Module, evaluated: State, trained: State, wanted: State
) -> Iterator[State]:
    """Yields states to load: `wanted` as `train()` rewrites it, `trained` plus the wanted change,
    `wanted` itself.
    """
    write(model, wanted)
    model.train()
    yield snapshot(model)
    yield {
        name: wanted[name]
        if torch.equal(x, trained[name])
        else (trained[name] + (wanted[name] - x)).to(x.dtype)
        for name, x in evaluated.items()
    }
    yield wanted


def _reload(model: nn.Module, saved: State) -> None:
    model.train()
    write(model, saved)
    model.eval()
