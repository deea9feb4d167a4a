"""The rung that may change the whole network or a block: training that goes on, tried out first, then polished.

A trial goes through a part of the budget without the held-out samples: by the owner's optimizers and schedule; where
that hardly repairs anything, by AdamW through the owner's `training_step`, or by distilled steps. Held-out samples
choose among them, and how far to go. The best trial goes on with all known data, then what broke is polished away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import lightning_nrl.methods.budget as budget
from lightning_nrl._utils.state import State, between, current_state
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.sample_results import Flips, TargetCounts
from lightning_nrl.methods._solvers.distill import distill
from lightning_nrl.methods._solvers.polish import polished
from lightning_nrl.methods.auto_rungs import RungResult, epoch_seconds, search_or_keep
from lightning_nrl.methods.finetune_polish import FIT_STRENGTH, visits_per_epoch
from lightning_nrl.methods.held_out import FEWEST_REPAIRS_SHARE, MAX_STANDARD_ERRORS, estimate
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Proposal, Solution, better
from lightning_nrl.report.run_records import Step
from lightning_nrl.search import Searcher

# Of AdamW through the owner's `training_step`: the usual one for small networks, and for pre-trained ones.
OWN_RATES = (1e-3, 1e-4)
HEALTHY_REPAIRS = 1 / 3  # a trial that repairs this part of the targets that it may use will do
# Parts of the way from the original weights; less than all of it where held-out samples speak for that. Without any it
# is `FIT_STRENGTH`.
STRENGTHS = (1.0, 0.8)


@dataclass(frozen=True)
class StepKind:
    """A way to make steps: the owner's, AdamW at a rate through the owner's `training_step`, or distilled ones."""

    name: str
    rate: float | None = None
    distilled: bool = False


CONTINUED, DISTILLED = StepKind("continued training"), StepKind("distilled steps", distilled=True)


@dataclass(frozen=True)
class Trial:
    """Weights trained without the held-out samples, and their counts."""

    kind: StepKind
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
        """True if many of the targets that were used are repaired, or held-out samples gain by more than chance."""
        counts = self.held_out
        gains = counts is not None and self.net > math.sqrt(counts.repaired + counts.broken)
        return self.net > 0 and (gains or self.proposal.repaired >= HEALTHY_REPAIRS * n_targets)

    @property
    def is_harmful(self) -> bool:
        """True if more held-out samples break than are repaired, by more than chance."""
        counts = self.held_out
        return counts is not None and self.net < -MAX_STANDARD_ERRORS * math.sqrt(counts.repaired + counts.broken)


def training_rung(problem: Problem, searcher: Searcher[Any], held_out: Tensor | None) -> RungResult | None:
    """Fits, polishes, localises what is left and searches it; None where the task has no margins or time is over."""
    began = problem.clock.elapsed
    found = _TrainingRung(problem, searcher, held_out).run()
    if found is None:
        return None
    return RungResult("training", found[1], problem.clock.elapsed - began, found[0].name)


class _TrainingRung:
    """The rung in progress: the steps that were made so far, and what was counted on the way."""

    def __init__(self, problem: Problem, searcher: Searcher[Any], held_out: Tensor | None) -> None:
        self.problem, self.searcher, self.held_out = problem, searcher, held_out
        self.deadline = problem.deadline_of_method().earlier(budget.POLISH_PASSES * problem.clock.one_pass)
        self.own = problem if held_out is None else problem.without(held_out)
        self.steps: list[Step] = []
        self.tried: list[TargetCounts] = []

    def run(self) -> tuple[StepKind, Solution] | None:
        _announce(self.problem)
        if self._leaves_time_for_trials():
            trials = list(self._trials())
            trial = best_trial(trials, self.held_out) if trials else None
        else:
            self.held_out = None
            trial = self._untried()
        if trial is None:
            return None
        if trial.is_harmful:
            reason = "training that goes on breaks more held-out samples than it repairs."
            return trial.kind, Solution(None, reason, tuple(self.steps), held_out=trial.held_out)
        fitted = trial.proposal
        if not trial.is_final:
            gone_on = self._fitted(trial.kind, budget.FINAL_SHARE, trial.state, trial.strength)
            fitted = fitted if gone_on is None else gone_on[1]
        polished = self._polished(fitted)
        if not polished.repaired and not trial.is_final:
            again = self.problem.propose("trial", scaled(self.problem, trial.state, trial.strength))
            polished = better([polished, self._polished(again)]) or polished
        found, counts = self._searched(trial, polished)
        steps, tried = (*self.steps, *found.steps), tuple(self.tried)
        return trial.kind, replace(found, steps=steps, held_out=counts, others=(fitted, polished), tried=tried)

    def _leaves_time_for_trials(self) -> bool:
        """True if a trial can have a few epochs of the owner's training, if there is one and time is limited."""
        problem = self.problem
        if not self.deadline.is_set or problem.training is None or not problem.whole:
            return True
        return self.deadline.leaves(budget.FEWEST_LIMITED_EPOCHS * epoch_seconds(problem) / budget.TRIAL_SHARE_OF_TIME)

    def _trials(self) -> Iterator[Trial]:
        clock, done, harmful = self.problem.clock, 0, True
        for kind in _kinds(self.problem):
            left = self.deadline.agreed_seconds_left()
            if left <= 0 or (done >= budget.MAX_TRIALS and not harmful):
                return
            with clock.stage("fit"):
                began = clock.elapsed
                limit = self.deadline if math.isinf(left) else self.deadline.within(budget.TRIAL_SHARE_OF_TIME * left)
                state = fit_weights(self.own, kind, budget.TRIAL_SHARE, budget.FEWEST_TRIAL_EPOCHS, limit)
                if state is None:
                    continue
                done += 1
                trial = self._judged(kind, state)
                counts, note = trial.held_out, f"{kind.name}, {trial.strength:.0%} of the way"
                if counts is not None:
                    note = f"{note}; held out {counts.repaired} repaired, {counts.broken} broken"
                self.steps.append(replace(trial.proposal.step(clock.elapsed - began, note), name="trial"))
            harmful &= trial.is_harmful
            yield trial
            if trial.does_well(int(self.own.before.targeted.sum())):
                return

    def _judged(self, kind: StepKind, state: State) -> Trial:
        """The trial at the strength that held-out samples speak for."""

        def at(strength: float) -> Trial:
            proposal, rows = self.own.propose("fit", scaled(self.problem, state, strength)), self.held_out
            counts = None if rows is None else estimate(self.problem.before, proposal.after, rows)
            return Trial(kind, state, strength, proposal, counts)

        if self.held_out is None:
            return at(FIT_STRENGTH)
        return best_trial([at(strength) for strength in STRENGTHS], self.held_out)

    def _untried(self) -> Trial | None:
        """The owner's training on all known data for as long as there is time, else distilled steps; no estimate."""
        for kind in (CONTINUED, DISTILLED):
            found = self._fitted(kind, 1.0, None, FIT_STRENGTH, "; no time for a trial")
            if found is not None:
                return Trial(kind, found[0], FIT_STRENGTH, found[1], None, is_final=True)
        return None

    def _fitted(
        self, kind: StepKind, share: float, start: State | None, strength: float, note: str = ""
    ) -> tuple[State, Proposal] | None:
        """Weights after a share of the budget, and a proposal on the way there; without time those of the start."""
        clock = self.problem.clock
        with clock.stage("fit"):
            began = clock.elapsed
            state = fit_weights(self.problem, kind, share, budget.FEWEST_EPOCHS, self.deadline, start)
            name = "not enough time: the trial's weights" if state is None else kind.name
            state = start if state is None else state
            if state is None:
                return None
            fitted = self.problem.propose("fit", scaled(self.problem, state, strength))
            self.steps.append(fitted.step(clock.elapsed - began, f"{name}, {strength:.0%} of the way{note}"))
        return state, fitted

    def _polished(self, fitted: Proposal) -> Proposal:
        proposal, step, course = polished(self.problem, fitted, steered=True)
        self.steps.append(step)
        self.tried.extend(course)
        return proposal

    def _searched(self, trial: Trial, polished: Proposal) -> tuple[Solution, TargetCounts | None]:
        """The search after the polish, if one after the trial gained held-out samples; and their counts.

        With few targets left a search that finds values for them may know no more than these.
        """
        found = search_or_keep(self.problem, self.searcher, polished)
        if self.held_out is None or found.proposal is polished:
            return found, trial.held_out
        after = search_or_keep(self.own, self.searcher, trial.proposal).proposal
        assert after is not None
        counts = estimate(self.problem.before, after.after, self.held_out)
        net = counts.repaired - counts.broken - trial.net
        if net > 0:
            return found, counts
        note = f"{found.steps[-1].note}; not taken: after the trial it gained {net:+} held-out samples"
        step = replace(found.steps[-1], repaired=polished.repaired, broken=polished.broken, note=note)
        return replace(found, proposal=polished, steps=(*found.steps[:-1], step)), trial.held_out


def best_trial(trials: Sequence[Trial], held_out: Tensor | None) -> Trial:
    """The first, unless another does better on held-out samples by more than chance, or far more on known ones."""
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
    if not problem.whole or problem.training is None:
        return (DISTILLED,)
    own = (StepKind(f"own steps through training_step, rate {rate:g}", rate) for rate in OWN_RATES)
    return (CONTINUED, *own, DISTILLED)


def fit_weights(
    problem: Problem, kind: StepKind, share: float, fewest: int, deadline: Deadline, start: State | None = None
) -> State | None:
    """Weights after a share of the budget; None where these steps cannot be made, or there is no time for them."""
    n, training, most = int(problem.used.sum()), problem.training, visit_budget(problem)
    seconds = deadline.agreed_seconds_left()
    if seconds <= 0:
        return None
    if kind.distilled:
        visits = round(share * (budget.VISITS_PER_SAMPLE * n if training is None else most))
        return distill(problem, deadline=deadline, start=start, visits=max(n, visits))
    assert training is not None
    return training(
        seconds=seconds,
        seed=problem.seed,
        clock=problem.clock,
        start=start,
        weight=visits_per_epoch(problem),
        epochs=max(round(share * most / n), min(fewest, training.epochs)),
        rate=kind.rate,
    )


def visit_budget(problem: Problem) -> float:
    """Visits that all training may make; with a limit of time that alone decides."""
    training, n = problem.training, len(problem.before)
    if training is None:
        return float(budget.VISITS_PER_SAMPLE * n)
    if math.isfinite(problem.clock.left):
        return float(max(training.visits, budget.LIMITED_EPOCHS * n))
    return float(max(training.visits, min(budget.SMALL_BUDGET, budget.SMALL_FIT_FACTOR * training.visits)))


def scaled(problem: Problem, state: State, strength: float) -> dict[str, Tensor]:
    """A part of the way from the original weights to a state."""
    return between(current_state(problem.model), state, strength)


def _announce(problem: Problem) -> None:
    clock, training, n = problem.clock, problem.training, len(problem.before)
    seconds = budget.POLISH_FACTOR * epoch_seconds(problem) * visit_budget(problem) / max(1, n)
    if math.isfinite(clock.left):
        seconds, bound = clock.left, "as `max_time` says"
    elif training is not None and training.fit_seconds is not None:
        bound = f"the fit took {training.fit_seconds:,.0f} s; give `max_time` for less"
    else:
        bound = "by the time of one pass over the data; give `max_time` for less"
    if seconds >= budget.MIN_ANNOUNCED_SECONDS:
        goes_on = problem.whole and training is not None
        how = f"the training goes on, with {n:,} known samples" if goes_on else f"steps are made on {n:,} known samples"
        clock.announce(
            f"Repair: the chosen layer was searched in {clock.elapsed:,.0f} s. Next {how}, and what breaks is polished "
            f"away: about {seconds:,.0f} s ({bound})."
        )
