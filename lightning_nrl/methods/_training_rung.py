"""The rung that may change the whole network or a block: training that goes on, tried out first, then polished.

A trial goes through a part of the budget without the held-out samples: by the owner's optimizers and schedule; where
that hardly repairs anything, by steps of the repair's own through the owner's `training_step`, or by distilled steps.
Held-out samples choose among them, and how far to go. The best trial goes on with all known data, then what broke is
polished away. Nothing of the trial is wasted: the rest of the training begins where it ended.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_nrl._optim.polish import polish
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.methods._held_out_estimate import estimate
from lightning_nrl.methods._pace_of_training import epoch_seconds
from lightning_nrl.methods._rungs import RungResult, search_or_keep, search_seconds
from lightning_nrl.methods._training_trials import (
    FEWEST_EPOCHS_AFTER,
    FINAL_SHARE,
    Trial,
    best_trial,
    fit_weights,
    leaves_time_for_trials,
    run_trials,
    scaled,
    untried,
    visit_budget,
)
from lightning_nrl.methods.finetune_polish import POLISH_PASSES
from lightning_nrl.problem import Problem, Proposal, Solution, better
from lightning_nrl.report.run_records import Step
from lightning_nrl.search import Searcher

__all__ = ["training_rung"]

MIN_ANNOUNCED_SECONDS = 3.0
"""What takes less is not worth a line."""

POLISH_FACTOR = 1.2
"""Of the time of all training, with the polish."""


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
        state = fit_weights(problem, trial.steps, FINAL_SHARE, FEWEST_EPOCHS_AFTER, deadline, trial.state)
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
    """Says what comes and about how long it takes, if that is longer than a few seconds."""
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
