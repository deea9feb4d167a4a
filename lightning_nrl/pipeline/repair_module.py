"""The core: known data in, report and weights out. Knows nothing of Lightning and never writes to the live model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_nrl._model.layers import find_scope
from lightning_nrl._utils.preserve import preserve
from lightning_nrl._utils.state import State, changed, holding, write
from lightning_nrl._utils.timing import Observer, StageTimer
from lightning_nrl.data.batch import Source
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import EmptyLocalizationError, NotRepairedWarning
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.quotas import needed
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.gate import Gate, check_protected, judge
from lightning_nrl.methods import solve
from lightning_nrl.pipeline.baseline import evaluate_baseline
from lightning_nrl.pipeline.calibration_bounds import Groups, bounds_after
from lightning_nrl.pipeline.input_checks import check_limit, check_sources, given_or_default
from lightning_nrl.pipeline.line_search import Calibration, Strength, find_strength
from lightning_nrl.pipeline.problem_builder import build_problem
from lightning_nrl.pipeline.report_builder import ReportBuilder
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.pipeline.sparsify import thin
from lightning_nrl.problem import Problem, Solution, Training, better
from lightning_nrl.reference.old_model import Reference
from lightning_nrl.reference.update import Update
from lightning_nrl.report import RepairReport, Role

__all__ = ["Observer", "Outcome", "repair_module"]

QUOTA_ROUNDS = 2
"""How often a method is run again where slices lack repairs, each time with more weight on them."""


@dataclass(frozen=True)
class Outcome:
    """What came of a repair.

    Attributes:
        report: the account of it.
        parameters: whole repaired parameters and buffers by the names of the state dict, to be written into the model;
            None unless accepted.
        change: the change of each weight that differs, accepted or not; None if no candidate was found.
    """

    report: RepairReport
    parameters: State | None = None
    change: Tensor | None = None

    def write(self, model: nn.Module) -> bool:
        """Copies the repaired weights into a model; one whose repair was not accepted stays as it is.

        Args:
            model: the model that was repaired, or another with the same parameters, on any device.

        Returns:
            Whether the model was changed.

        Raises:
            ConfigurationError: a tensor is not in the model, or has another shape; nothing was written.
        """
        write(model, self.parameters or {})
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
) -> Outcome:
    """Collects evidence, finds new weights and judges them. The model is left as found: `Outcome.write` changes it.

    Args:
        model: the trained model on its device; it runs in evaluation mode. An `Evaluator` says what else there is to
            say of it: the task, mixed precision, the ranks that share the data. Each rank ends with the same outcome.
        known: data that the repair may look at; all of it is what the gate judges by.
        settings: what to repair and how.
        unseen: data that is only counted, before and after an accepted repair; its marks do not matter.
        calibration: data that no search looks at, to choose the strength by; its marks do not matter.
        training: goes on with the training, for methods that do; None: they make steps of their own.
        reference: the model that this one replaces. What that one gets right and this one wrong, of all known data, is
            what is to be repaired, as far as it is in the target.
        observer: is told how it goes.

    Returns:
        The outcome. That there is nothing to repair, or no way to, is a report, not an exception.

    Raises:
        ConfigurationError: the layer, the data, the target or the task cannot be used.
        EvaluationError: the original model gives losses that are not finite; the samples are named.
    """
    settings, evaluator = given_or_default(settings), Evaluator.of(model)
    model, clock = evaluator.model, StageTimer(observer, settings.max_time)
    check_sources(known, (*calibration, *unseen), settings)
    check_limit(settings, bool(calibration))
    others: dict[Role, Sequence[Source]] = {"calibration": calibration, "unseen": unseen}
    others = {role: sources for role, sources in others.items() if sources}
    layers = find_scope(model, settings.layer, include_bias=settings.localizer.include_bias)
    with preserve(model):
        found = evaluate_baseline(evaluator, known, others, settings, clock=clock, reference=reference)
        before, update = found.before, found.update
        account = ReportBuilder(
            model,
            layers[0],
            settings,
            evaluator.task,
            found.known,
            found.held_out,
            clock.seconds,
            update=update,
            left_out=found.set_aside,
        )
        if not before.targeted.any():
            return Outcome(account.closed("nothing to repair", _nothing(found.known, known, settings.target, update)))
        quotas, impossible = needed(before, settings.samples.quotas or {})
        if impossible:
            return _given_up(account, impossible)
        problem = build_problem(
            evaluator,
            known,
            before,
            layers,
            settings,
            clock=clock,
            training=training,
            update=update is not None,
            needed=quotas,
        )
        if not problem.passed.any():
            return _given_up(account, _nothing_passes(before, known))
        try:
            solution = _solved(problem, settings)
        except EmptyLocalizationError as error:
            return _given_up(account, str(error))
        solution = _thinned(problem, solution, settings.bounds.sparse)
        account = account.solved(solution, int(problem.passed.sum()))
        proposal = solution.proposal
        new = {} if proposal is None else changed(model, proposal.state)
        if proposal is None or not new:
            reason = solution.reason or "the search found nothing better than the original weights."
            return Outcome(account.closed("not repaired", reason))
        return _concluded(account, problem, new, proposal.after, others, found.groups)


def _concluded(
    account: ReportBuilder,
    problem: Problem,
    new: State,
    after: SampleResults,
    others: Mapping[Role, Sequence[Source]],
    groups: Groups | None,
) -> Outcome:
    """How far to go, and whether the deployed model may have it."""
    model, settings = problem.model, account.settings
    sources, aside = others.get("calibration", ()), account.aside.get("calibration")
    strength = _find_strength(problem, new, after, settings, None if aside is None else Calibration(sources, aside))
    account = account.at(strength)
    if strength.chosen is None:
        return Outcome(account.closed("not repaired", f"no strength keeps within the limit ({settings.limit})."))
    new = changed(model, strength.state)
    if not new:
        # The polish of a weaker patch went all the way back, or the change is below what the weights resolve.
        reason = f"at strength {strength.chosen:g} nothing is left of the change."
        return Outcome(account.closed("not repaired", reason))
    with problem.clock.stage("judge"), holding(model, new):
        after = problem.evaluator.run(problem.known)
        verdict = judge(problem.before, after, settings.gate, problem.needed)
        if verdict.accepted and account.known is not problem.before:
            # What only the new model gets right may break, but not for fewer regressions repaired.
            rest = judge(account.known, after, Gate.accuracy())
            verdict = verdict if rest.accepted else rest
        later = {role: problem.evaluator.run(sources) for role, sources in others.items() if verdict.accepted}
        if "calibration" in later:
            verdict = check_protected(verdict, account.aside["calibration"], later["calibration"])
    old = {name: value for name, value in model.state_dict().items() if name in new}
    bounds = None
    if groups is not None and verdict.accepted:
        bounds = bounds_after(account.aside["calibration"], later["calibration"], groups, strength.selection, settings)
    report = account.judged(verdict, old, new, after, later, bounds)
    return Outcome(report, new if verdict.accepted else None, _change(old, new))


def _solved(problem: Problem, settings: Settings) -> Solution:
    """What the method finds; where slices lack repairs of their quotas, with more weight on these, as time allows."""
    solution = solve(settings.method, problem)
    for _ in range(QUOTA_ROUNDS if problem.needed else 0):
        best, began = solution.proposal, problem.clock.elapsed
        after = problem.before if best is None else best.after
        again = problem.steered(after)
        if again is problem or problem.collective.any(problem.clock.left < began):
            break
        problem, found = again, solve(settings.method, again)
        steps = (*solution.steps, *(replace(step, name=f"{step.name}, for quotas") for step in found.steps))
        chosen = found if better([best, found.proposal]) is not best else solution
        solution = replace(chosen, steps=steps)
    return solution


def _thinned(problem: Problem, solution: Solution, loss: float | None) -> Solution:
    """The solution with as few changed weights as the user's loss of repairs allows."""
    if loss is None or solution.proposal is None:
        return solution
    with problem.clock.stage("sparse"):
        thinned = thin(problem, solution.proposal, loss)
    return replace(solution, proposal=thinned.proposal, steps=(*solution.steps, thinned.step))


def _find_strength(
    problem: Problem, new: State, after: SampleResults, settings: Settings, calibration: Calibration | None
) -> Strength:
    with problem.clock.stage("strength"):
        return find_strength(
            problem,
            new,
            settings.gate,
            calibration=calibration,
            fixed=settings.bounds.strength,
            limit=settings.limit,
            after=after,
        )


def _change(old: State, new: State) -> Tensor:
    """What was added to each weight that differs, on the CPU."""
    changes = [(new[name].cpu().double() - old[name].cpu().double()).flatten() for name in new]
    change = torch.cat(changes)
    return change[change != 0].float()


def _nothing_passes(before: SampleResults, known: Sequence[Source]) -> str:
    if not before.passed.any():
        return "no known sample passes, so there is nothing to keep and nothing to compare with."
    names = " and ".join(source.split for source in known if source.passed)
    return f"no sample of {names} passes, so `n_passed` has nothing to draw from."


def _nothing(before: SampleResults, known: Sequence[Source], target: Target, update: Update | None) -> str:
    if update is not None:
        return (
            f"no known sample in the target ({target}) that the replaced model gets right is wrong under the new one."
        )
    failed = ~before.passed
    counts = ", ".join(f"{int(failed[before.of(source.split)].sum())} in {source.split}" for source in known)
    where = " and ".join(source.split for source in known if source.failed)
    return f"no failed sample of {where} is in the target ({target}); failures in all: {counts}."


def _given_up(account: ReportBuilder, reason: str) -> Outcome:
    warnings.warn(f"not repaired: {reason}", category=NotRepairedWarning, stacklevel=3)
    return Outcome(account.closed("not repaired", reason))
