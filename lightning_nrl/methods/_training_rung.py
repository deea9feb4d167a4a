"""The rung that may change the whole network or a block: training that goes on, tried out first, then polished.

A trial goes through a part of the budget without the held-out samples: by the owner's optimizers and schedule; where
that hardly repairs anything, by steps of the repair's own through the owner's `training_step`, or by distilled steps.
Held-out samples choose among them, and how far to go. The best trial goes on with all known data, then what broke is
polished away. Nothing of the trial is wasted: the rest of the training begins where it ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_nrl._optim.distill import VISITS_PER_SAMPLE, distill
from lightning_nrl._optim.polish import polish
from lightning_nrl._utils.state import State, between
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.flips import Flips, TargetCounts
from lightning_nrl.methods._held_out_estimate import MAX_STANDARD_ERRORS, estimate
from lightning_nrl.methods._rungs import RungResult, search_or_keep, search_seconds
from lightning_nrl.methods.finetune_polish import FIT_STRENGTH, POLISH_PASSES, visits_per_epoch
from lightning_nrl.problem import Problem, Proposal, Solution, better
from lightning_nrl.report.run_records import Step
from lightning_nrl.search import Searcher

__all__ = ["training_rung"]

OWN_RATES = (1e-3, 1e-4)
"""Of AdamW through the owner's `training_step`: the usual one for small networks, and for pre-trained ones."""

TRIAL_SHARE, FINAL_SHARE = 0.3, 0.7
"""Of the visits that the fit made, what each trial makes, and what goes on from the best."""

TRIAL_SHARE_OF_TIME = 0.3
"""Of the time that is left, where it is limited."""

MAX_TRIALS = 2
"""Without a limit of time; then a trial that hardly repairs anything is not replaced any more."""

FEWEST_TRIAL_EPOCHS, FEWEST_EPOCHS_AFTER = 2, 3
"""Schedules are not squeezed further, unless the fit had fewer."""

SMALL_BUDGET, SMALL_FIT_FACTOR = 60_000, 2
"""Visits that are seconds' work for a small network: after a smaller fit, training may make twice as many as that."""

LIMITED_EPOCHS = 40
"""Where time is limited, so many epochs are the most that it is filled with, unless the fit had more."""

MIN_ANNOUNCED_SECONDS = 3.0
"""What takes less is not worth a line."""

SECONDS_PER_VISIT = 3.0
"""Of a training step on a sample, in forward passes."""

HEALTHY_REPAIRS = 1 / 3
"""A trial that repairs this part of the targets that it may use, and more held-out samples than it breaks, will do."""

STRENGTHS = (1.0, 0.9, 0.75)
"""Parts of the way from the original weights; less than all of it where held-out samples speak for that. Without any
it is `FIT_STRENGTH`."""


@dataclass(frozen=True)
class _Steps:
    """A way to make steps: the owner's, AdamW at a rate through the owner's `training_step`, or distilled ones."""

    name: str
    rate: float | None = None
    distilled: bool = False


@dataclass(frozen=True)
class _Trial:
    """What steps gave without the held-out samples."""

    steps: _Steps
    state: State
    strength: float
    proposal: Proposal
    held_out: TargetCounts | None

    @property
    def net(self) -> int:
        counts = self.held_out
        return self.proposal.repaired - self.proposal.broken if counts is None else counts.repaired - counts.broken


def training_rung(problem: Problem, searcher: Searcher[Any], held_out: Tensor | None) -> RungResult | None:
    """Fits, polishes, localises what is left and searches it; None where the task has no margins or time is over."""
    clock = problem.clock
    began, deadline = clock.elapsed, problem.deadline_of_method().earlier(POLISH_PASSES * clock.one_pass)
    steps: list[Step] = []
    _announce(problem)
    trials = list(_trials(problem, held_out, deadline, steps))
    if not trials:
        return None
    trial = _best_trial(trials, held_out)
    with clock.stage("fit"):
        started = clock.elapsed
        state = _fit(problem, trial.steps, FINAL_SHARE, FEWEST_EPOCHS_AFTER, deadline, trial.state)
        found = trial.state if state is None else state
        fitted = problem.propose("fit", _scaled(problem, found, trial.strength))
        note = "not enough time: the trial's weights" if state is None else trial.steps.name
        steps.append(fitted.step(clock.elapsed - started, f"{note}, {trial.strength:.0%} of the way"))
    tried: list[TargetCounts] = []
    polished = _polished(problem, fitted, steps, tried)
    if not polished.repaired and state is not None:
        again = problem.propose("trial", _scaled(problem, trial.state, trial.strength))
        polished = better([polished, _polished(problem, again, steps, tried)]) or polished
    last = search_or_keep(problem, searcher, polished, seconds=search_seconds(problem))
    last, counts = _tried_search(problem, searcher, trial, held_out, polished, last)
    solution = replace(last, steps=(*steps, *last.steps), held_out=counts, others=(fitted, polished))
    return RungResult("training", solution, clock.elapsed - began, trial.steps.name, tuple(tried))


def _trials(problem: Problem, held_out: Tensor | None, deadline: Deadline, steps: list[Step]) -> Iterator[_Trial]:
    """Trials until one does well, or none are left to be made."""
    clock, own = problem.clock, problem if held_out is None else problem.without(held_out)
    done = 0
    for kind in _kinds(problem):
        left = deadline.agreed_seconds_left()
        if left <= 0 or (done == MAX_TRIALS):
            return
        with clock.stage("fit"):
            began = clock.elapsed
            limit = deadline if math.isinf(left) else deadline.within(TRIAL_SHARE_OF_TIME * left)
            state = _fit(own, kind, TRIAL_SHARE, FEWEST_TRIAL_EPOCHS, limit)
            if state is None:
                continue
            done += 1
            trial = _judged(own, problem, kind, state, held_out)
            steps.append(replace(trial.proposal.step(clock.elapsed - began, _trial_note(trial)), name="trial"))
        yield trial
        targets = int(own.before.targeted.sum())
        if trial.proposal.repaired >= HEALTHY_REPAIRS * targets and trial.net > 0:
            return


def _best_trial(trials: Sequence[_Trial], held_out: Tensor | None) -> _Trial:
    """The first one, unless another does better on held-out samples by more than chance."""
    best = trials[0]
    for other in trials[1:]:
        flips = Flips.between(best.proposal.after, other.proposal.after)
        differ = flips.broken | flips.repaired
        # Where they differ, either may be right.
        error = math.sqrt(int((differ if held_out is None else differ & held_out).sum()))
        if other.net - best.net > MAX_STANDARD_ERRORS * error:
            best = other
    return best


def _kinds(problem: Problem) -> tuple[_Steps, ...]:
    distilled = _Steps("distilled steps", distilled=True)
    if not problem.whole or problem.training is None:
        return (distilled,)
    own = tuple(_Steps(f"own steps through training_step, rate {rate:g}", rate) for rate in OWN_RATES)
    return (_Steps("continued training"), *own, distilled)


def _fit(
    problem: Problem, kind: _Steps, share: float, fewest: int, deadline: Deadline, start: State | None = None
) -> State | None:
    """Weights after a share of the budget; None where these steps cannot be made, or there is no time for them."""
    n, training = int(problem.used.sum()), problem.training
    seconds = deadline.agreed_seconds_left()
    if seconds <= 0:
        return None
    if kind.distilled:
        visits = round(share * (VISITS_PER_SAMPLE * n if training is None else _budget(problem)))
        return distill(problem, deadline=deadline, start=start, visits=max(n, visits))
    assert training is not None
    epochs = max(round(share * _budget(problem) / n), min(fewest, training.epochs))
    return training(
        seconds=seconds,
        seed=problem.seed,
        clock=problem.clock,
        start=start,
        weight=visits_per_epoch(problem),
        epochs=epochs,
        rate=kind.rate,
    )


def _budget(problem: Problem) -> float:
    """Visits that all training may make; with a limit of time that alone decides."""
    training, n = problem.training, len(problem.before)
    if training is None:
        return float(VISITS_PER_SAMPLE * n)
    if math.isfinite(problem.clock.left):
        return float(max(training.visits, LIMITED_EPOCHS * n))
    return float(max(training.visits, min(SMALL_BUDGET, SMALL_FIT_FACTOR * training.visits)))


def _tried_search(
    problem: Problem,
    searcher: Searcher[Any],
    trial: _Trial,
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
    """Says what comes and about how long it takes, if that is longer than a few seconds."""
    clock, training, n = problem.clock, problem.training, len(problem.before)
    if math.isfinite(clock.left):
        seconds, bound = clock.left, "`max_time` bounds it"
    elif training is not None and training.fit_seconds is not None:
        seconds, bound = training.fit_seconds, f"as long as the fit took ({training.fit_seconds:,.0f} s) at most"
    else:
        seconds = SECONDS_PER_VISIT * clock.one_pass * _budget(problem) / max(1, n)
        bound = "by the time of one pass over the data"
    if seconds < MIN_ANNOUNCED_SECONDS:
        return
    how = "the training goes on" if problem.whole and training is not None else "distilled steps are made"
    clock.announce(
        f"Repair: the chosen layer was searched in {clock.elapsed:,.0f} s. Now {how} on {n:,} known samples, then what "
        f"breaks is polished away: about {seconds:,.0f} s, {bound}. Give `max_time` for less."
    )


def _judged(own: Problem, problem: Problem, kind: _Steps, state: State, held_out: Tensor | None) -> _Trial:
    """The trial at the strength that held-out samples speak for."""

    def at(strength: float) -> _Trial:
        proposal = own.propose("fit", _scaled(problem, state, strength))
        counts = None if held_out is None else estimate(problem.before, proposal.after, held_out)
        return _Trial(kind, state, strength, proposal, counts)

    if held_out is None:
        return at(FIT_STRENGTH)
    return _best_trial([at(strength) for strength in STRENGTHS], held_out)


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


def _scaled(problem: Problem, state: State, strength: float) -> dict[str, Tensor]:
    return between(problem.model.state_dict(), state, strength)


def _trial_note(trial: _Trial) -> str:
    counts = trial.held_out
    held = "" if counts is None else f"; held out {counts.repaired} repaired, {counts.broken} broken"
    return f"{trial.steps.name}, {trial.strength:.0%} of the way{held}"
