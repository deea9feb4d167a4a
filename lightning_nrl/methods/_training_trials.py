"""Trials of the training that goes on: which steps, and how far to go, is chosen by samples that they may not use.

The owner's optimizers and schedule come first; where these hardly repair anything, AdamW through the owner's
`training_step`, then distilled steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_nrl._optim.distill import VISITS_PER_SAMPLE, distill
from lightning_nrl._utils.state import State, between, current_state
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.sample_results import Flips, TargetCounts
from lightning_nrl.methods._held_out_estimate import FEWEST_REPAIRS_SHARE, MAX_STANDARD_ERRORS, estimate
from lightning_nrl.methods._pace_of_training import epoch_seconds
from lightning_nrl.methods.finetune_polish import FIT_STRENGTH, visits_per_epoch
from lightning_nrl.problem import Problem, Proposal
from lightning_nrl.report.run_records import Step

__all__ = [
    "FEWEST_EPOCHS_AFTER",
    "FINAL_SHARE",
    "StepKind",
    "Trial",
    "best_trial",
    "fit_weights",
    "leaves_time_for_trials",
    "run_trials",
    "scaled",
    "untried",
    "visit_budget",
]

OWN_RATES = (1e-3, 1e-4)
"""Of AdamW through the owner's `training_step`: the usual one for small networks, and for pre-trained ones."""

TRIAL_SHARE, FINAL_SHARE = 0.2, 0.8
"""Of the visits that the fit made, what each trial makes, and what goes on from the best."""

FEWEST_LIMITED_EPOCHS = 5
"""A trial in limited time is not made for less; the pace is measured first, which takes a part of its time."""

TRIAL_SHARE_OF_TIME = 0.3
"""Of the time that is left, where it is limited."""

MAX_TRIALS = 2
"""After so many another one follows only if all of them do harm."""

FEWEST_TRIAL_EPOCHS, FEWEST_EPOCHS_AFTER = 2, 3
"""Schedules are not squeezed further, unless the fit had fewer."""

SMALL_BUDGET, SMALL_FIT_FACTOR = 60_000, 2
"""Visits that are seconds' work for a small network: after a smaller fit, training may make twice as many as that."""

LIMITED_EPOCHS = 40
"""Where time is limited, so many epochs are the most that it is filled with, unless the fit had more."""

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
            state = fit_weights(problem, kind, 1.0, FEWEST_EPOCHS_AFTER, deadline)
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
