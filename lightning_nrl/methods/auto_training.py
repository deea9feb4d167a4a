"""The rung that may change the whole network or a block: training that goes on, tried out first, then polished.

A trial goes through a part of the budget without the held-out samples: by the owner's optimizers and schedule; where
that hardly repairs anything, by AdamW through the owner's `training_step`, or by distilled steps. Held-out samples
choose among them, and how far to go. The best trial goes on with all known data, then what broke is polished away.
Nothing of the trial is wasted: the rest of the training begins where it ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_nrl._utils.state import State, between, current_state
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.sample_results import Flips, TargetCounts
from lightning_nrl.methods._solvers.distill import distill
from lightning_nrl.methods._solvers.polish import polish
from lightning_nrl.methods.auto_rungs import RungResult, epoch_seconds, search_or_keep, search_seconds
from lightning_nrl.methods.budget import (
    FEWEST_EPOCHS,
    FEWEST_LIMITED_EPOCHS,
    FEWEST_TRIAL_EPOCHS,
    FINAL_SHARE,
    LIMITED_EPOCHS,
    MAX_TRIALS,
    MIN_ANNOUNCED_SECONDS,
    POLISH_FACTOR,
    POLISH_PASSES,
    SMALL_BUDGET,
    SMALL_FIT_FACTOR,
    TRIAL_SHARE,
    TRIAL_SHARE_OF_TIME,
    VISITS_PER_SAMPLE,
)
from lightning_nrl.methods.finetune_polish import FIT_STRENGTH, visits_per_epoch
from lightning_nrl.methods.held_out import FEWEST_REPAIRS_SHARE, MAX_STANDARD_ERRORS, estimate
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Proposal, Solution, better
from lightning_nrl.report.run_records import Step
from lightning_nrl.search import Searcher

OWN_RATES = (1e-3, 1e-4)
"""Of AdamW through the owner's `training_step`: the usual one for small networks, and for pre-trained ones."""

HEALTHY_REPAIRS = 1 / 3
"""A trial that repairs this part of the targets that it may use will do."""

STRENGTHS = (1.0, 0.8)
"""Parts of the way from the original weights; less than all of it where held-out samples speak for that. Without any
it is `FIT_STRENGTH`."""


@dataclass(frozen=True)
class StepKind:
    """A way to make steps: the owner's, AdamW at a rate through the owner's `training_step`, or distilled ones."""

    name: str
    rate: float | None = None
    distilled: bool = False


@dataclass(frozen=True)
class Trial:
    """What steps gave without the held-out samples."""

    steps: StepKind
    state: State
    strength: float
    proposal: Proposal
    held_out: TargetCounts | None
    is_final: bool = False  # whether it was trained on all known data for all of the time

    @property
    def net(self) -> int:
        """Repaired less broken held-out samples; without any, targets less known samples."""
        counts = self.held_out
        return self.proposal.repaired - self.proposal.broken if counts is None else counts.repaired - counts.broken

    def does_well(self, n_targets: int) -> bool:
        """Whether no other steps need to be tried.

        Many of the targets that were used are repaired, or held-out samples gain by more than chance.
        """
        counts = self.held_out
        gains = counts is not None and self.net > math.sqrt(counts.repaired + counts.broken)
        return self.net > 0 and (gains or self.proposal.repaired >= HEALTHY_REPAIRS * n_targets)

    @property
    def is_harmful(self) -> bool:
        """Whether more held-out samples break than are repaired, by more than chance."""
        counts = self.held_out
        return counts is not None and self.net < -MAX_STANDARD_ERRORS * math.sqrt(counts.repaired + counts.broken)


def run_trials(problem: Problem, held_out: Tensor | None, deadline: Deadline, steps: list[Step]) -> Iterator[Trial]:
    """Trials until one does well, or none are left to be made."""
    clock, own = problem.clock, problem if held_out is None else problem.without(held_out)
    done, harmful = 0, True
    for kind in _kinds(problem):
        left = deadline.agreed_seconds_left()
        if left <= 0 or (done >= MAX_TRIALS and not harmful):
            return
        with clock.stage("fit"):
            began = clock.elapsed
            limit = deadline if math.isinf(left) else deadline.within(TRIAL_SHARE_OF_TIME * left)
            state = fit_weights(own, kind, TRIAL_SHARE, FEWEST_TRIAL_EPOCHS, limit)
            if state is None:
                continue
            done += 1
            trial = _judged(own, problem, kind, state, held_out)
            steps.append(replace(trial.proposal.step(clock.elapsed - began, _trial_note(trial)), name="trial"))
        harmful &= trial.is_harmful
        yield trial
        if trial.does_well(int(own.before.targeted.sum())):
            return


def leaves_time_for_trials(problem: Problem, deadline: Deadline) -> bool:
    """Whether a trial can have a few epochs of the owner's training; without a limit, or without a training, always."""
    training = problem.training
    if not deadline.is_set or training is None or not problem.whole:
        return True
    return deadline.leaves(FEWEST_LIMITED_EPOCHS * epoch_seconds(problem) / TRIAL_SHARE_OF_TIME)


def untried(problem: Problem, deadline: Deadline, steps: list[Step]) -> Trial | None:
    """The owner's training on all known data for as long as there is time, else distilled steps; no estimate."""
    clock = problem.clock
    for kind in (StepKind("continued training"), StepKind("distilled steps", distilled=True)):
        with clock.stage("fit"):
            began = clock.elapsed
            state = fit_weights(problem, kind, 1.0, FEWEST_EPOCHS, deadline)
            if state is not None:
                proposal = problem.propose("fit", scaled(problem, state, FIT_STRENGTH))
                note = f"{kind.name}, {FIT_STRENGTH:.0%} of the way; no time for a trial"
                steps.append(proposal.step(clock.elapsed - began, note))
                return Trial(kind, state, FIT_STRENGTH, proposal, None, is_final=True)
    return None


def best_trial(trials: Sequence[Trial], held_out: Tensor | None) -> Trial:
    """The first one, unless another does better on held-out samples by more than chance, or far more on known ones."""
    best = trials[0]
    for other in trials[1:]:
        flips = Flips.between(best.proposal.after, other.proposal.after)
        differ = flips.broken | flips.repaired
        # Where they differ, either may be right.
        error = math.sqrt(int((differ if held_out is None else differ & held_out).sum()))
        # One that hardly repairs anything, known or held out, is no better for breaking nothing.
        does_more = best.proposal.repaired < FEWEST_REPAIRS_SHARE * other.proposal.repaired and other.net >= best.net
        if does_more or other.net - best.net > MAX_STANDARD_ERRORS * error:
            best = other
    return best


def _kinds(problem: Problem) -> tuple[StepKind, ...]:
    distilled = StepKind("distilled steps", distilled=True)
    if not problem.whole or problem.training is None:
        return (distilled,)
    own = tuple(StepKind(f"own steps through training_step, rate {rate:g}", rate) for rate in OWN_RATES)
    return (StepKind("continued training"), *own, distilled)


def fit_weights(
    problem: Problem, kind: StepKind, share: float, fewest: int, deadline: Deadline, start: State | None = None
) -> State | None:
    """Weights after a share of the budget; None where these steps cannot be made, or there is no time for them."""
    n, training = int(problem.used.sum()), problem.training
    seconds = deadline.agreed_seconds_left()
    if seconds <= 0:
        return None
    if kind.distilled:
        visits = round(share * (VISITS_PER_SAMPLE * n if training is None else visit_budget(problem)))
        return distill(problem, deadline=deadline, start=start, visits=max(n, visits))
    assert training is not None
    epochs = max(round(share * visit_budget(problem) / n), min(fewest, training.epochs))
    return training(
        seconds=seconds,
        seed=problem.seed,
        clock=problem.clock,
        start=start,
        weight=visits_per_epoch(problem),
        epochs=epochs,
        rate=kind.rate,
    )


def visit_budget(problem: Problem) -> float:
    """Visits that all training may make; with a limit of time that alone decides."""
    training, n = problem.training, len(problem.before)
    if training is None:
        return float(VISITS_PER_SAMPLE * n)
    if math.isfinite(problem.clock.left):
        return float(max(training.visits, LIMITED_EPOCHS * n))
    return float(max(training.visits, min(SMALL_BUDGET, SMALL_FIT_FACTOR * training.visits)))


def _judged(own: Problem, problem: Problem, kind: StepKind, state: State, held_out: Tensor | None) -> Trial:
    """The trial at the strength that held-out samples speak for."""

    def at(strength: float) -> Trial:
        proposal = own.propose("fit", scaled(problem, state, strength))
        counts = None if held_out is None else estimate(problem.before, proposal.after, held_out)
        return Trial(kind, state, strength, proposal, counts)

    if held_out is None:
        return at(FIT_STRENGTH)
    return best_trial([at(strength) for strength in STRENGTHS], held_out)


def scaled(problem: Problem, state: State, strength: float) -> dict[str, Tensor]:
    """A part of the way from the original weights to a state."""
    return between(current_state(problem.model), state, strength)


def _trial_note(trial: Trial) -> str:
    counts = trial.held_out
    held = "" if counts is None else f"; held out {counts.repaired} repaired, {counts.broken} broken"
    return f"{trial.steps.name}, {trial.strength:.0%} of the way{held}"


def training_rung(problem: Problem, searcher: Searcher[Any], held_out: Tensor | None) -> RungResult | None:
    """Fits, polishes, localises what is left and searches it; None where the task has no margins or time is over."""
    clock = problem.clock
    began, deadline = clock.elapsed, problem.deadline_of_method().earlier(POLISH_PASSES * clock.one_pass)
    steps: list[Step] = []
    _announce(problem)
    if leaves_time_for_trials(problem, deadline):
        trials = list(run_trials(problem, held_out, deadline, steps))
        trial = best_trial(trials, held_out) if trials else None
    else:
        trial, held_out = untried(problem, deadline, steps), None
    if trial is None:
        return None
    if trial.is_harmful:
        reason = "training that goes on breaks more held-out samples than it repairs."
        solution = Solution(None, reason, tuple(steps), held_out=trial.held_out)
        return RungResult("training", solution, clock.elapsed - began, trial.steps.name)
    fitted = trial.proposal if trial.is_final else _fitted(problem, trial, deadline, steps)
    tried: list[TargetCounts] = []
    polished = _polished(problem, fitted, steps, tried)
    if not polished.repaired and not trial.is_final:
        again = problem.propose("trial", scaled(problem, trial.state, trial.strength))
        polished = better([polished, _polished(problem, again, steps, tried)]) or polished
    last = search_or_keep(problem, searcher, polished, seconds=search_seconds(problem))
    last, counts = _tried_search(problem, searcher, trial, held_out, polished, last)
    solution = replace(last, steps=(*steps, *last.steps), held_out=counts, others=(fitted, polished))
    return RungResult("training", solution, clock.elapsed - began, trial.steps.name, tuple(tried))


def _fitted(problem: Problem, trial: Trial, deadline: Deadline, steps: list[Step]) -> Proposal:
    """What goes on from the trial, on all known data; the trial's weights where there is no time for it."""
    clock = problem.clock
    with clock.stage("fit"):
        began = clock.elapsed
        state = fit_weights(problem, trial.steps, FINAL_SHARE, FEWEST_EPOCHS, deadline, trial.state)
        found = trial.state if state is None else state
        fitted = problem.propose("fit", scaled(problem, found, trial.strength))
        note = "not enough time: the trial's weights" if state is None else trial.steps.name
        steps.append(fitted.step(clock.elapsed - began, f"{note}, {trial.strength:.0%} of the way"))
    return fitted


def _tried_search(
    problem: Problem,
    searcher: Searcher[Any],
    trial: Trial,
    held_out: Tensor | None,
    polished: Proposal,
    found: Solution,
) -> tuple[Solution, TargetCounts | None]:
    """The search after the polish, if one after the trial gained held-out samples; and their counts.

    With few targets left a search that finds values for them may know no more than these.
    """
    if held_out is None or found.proposal is None or found.proposal is polished:
        return found, trial.held_out
    own = problem.without(held_out)
    after = search_or_keep(own, searcher, trial.proposal, seconds=search_seconds(problem)).proposal
    counts = trial.held_out if after is None else estimate(problem.before, after.after, held_out)
    assert counts is not None
    net = counts.repaired - counts.broken - trial.net
    if net > 0:
        return found, counts
    note = f"{found.steps[-1].note}; not taken: after the trial it gained {net:+} held-out samples"
    step = replace(found.steps[-1], repaired=polished.repaired, broken=polished.broken, note=note)
    return replace(found, proposal=polished, steps=(*found.steps[:-1], step)), trial.held_out


def _announce(problem: Problem) -> None:
    clock, training, n = problem.clock, problem.training, len(problem.before)
    seconds = POLISH_FACTOR * epoch_seconds(problem) * visit_budget(problem) / max(1, n)
    if math.isfinite(clock.left):
        seconds, bound = clock.left, "as `max_time` says"
    elif training is not None and training.fit_seconds is not None:
        bound = f"the fit took {training.fit_seconds:,.0f} s; give `max_time` for less"
    else:
        bound = "by the time of one pass over the data; give `max_time` for less"
    if seconds < MIN_ANNOUNCED_SECONDS:
        return
    goes_on = problem.whole and training is not None
    how = f"the training goes on, with {n:,} known samples" if goes_on else f"steps are made on {n:,} known samples"
    clock.announce(
        f"Repair: the chosen layer was searched in {clock.elapsed:,.0f} s. Next {how}, and what breaks is polished "
        f"away: about {seconds:,.0f} s ({bound})."
    )


def _polished(problem: Problem, fitted: Proposal, steps: list[Step], tried: list[TargetCounts]) -> Proposal:
    """What is left when nothing known is broken; the counts on the way are added to `tried`."""
    clock = problem.clock
    with clock.stage("polish"):
        began = clock.elapsed
        steered = problem.steered(fitted.after)
        result = polish(steered, fitted.state, deadline=problem.deadline_of_method(), after=fitted.after)
        proposal = problem.counted("polish", result.state, result.after)
        steps.append(proposal.step(clock.elapsed - began, result.note))
        tried.extend(result.course)
    return proposal
