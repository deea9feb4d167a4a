"""Fit, then polish: repair as many as possible first, then bring back all that broke on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lightning_nrl._utils.state import State, between, current_state
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import check_real
from lightning_nrl.evaluation.evaluator import Need, check_needs
from lightning_nrl.methods._solvers.descent import MAX_SAMPLE_WEIGHT
from lightning_nrl.methods._solvers.distill import distill
from lightning_nrl.methods._solvers.polish import polished
from lightning_nrl.methods.budget import POLISH_PASSES
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Solution

# How far to go from the original weights to those of a fit: the rest of the way repairs few and breaks many.
FIT_STRENGTH = 0.9


@dataclass(frozen=True)
class FineTunePolish:
    """Repairs under the constraint that no known passed sample breaks.

    Where the whole network may change and it is known how it was trained, the training goes on from the old weights
    with the failed data added: more is repaired, and less breaks on unseen data, than by a training from scratch.
    Else, for a layer or a block, or where time is too short for that, it makes distilled steps of its own
    (`_solvers/distill.py`). Nine tenths of the change are made. A polish (`_solvers/polish.py`) then brings back every
    known passed sample that broke.

    Attributes:
        share: of the time that is left, what fit and polish are planned to take; the rest is for what comes after them.

    Raises:
        ConfigurationError: on construction, for a share that is not above 0 and at most 1.
    """

    trains: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("margins",)
    share: float = 1.0

    def __post_init__(self) -> None:
        hint = "give a number above 0 and at most 1."
        check_real("FineTunePolish.share", self.share, "share", hint, above=0, most=1)

    def __call__(self, problem: Problem) -> Solution:
        """Fits and polishes; a `ConfigurationError` if the task has no margins."""
        check_needs(self.needs, problem.before, problem.evaluator.task)
        clock = problem.clock
        fit_deadline = problem.deadline_of_method(self.share).earlier(POLISH_PASSES * clock.one_pass)
        began = time.perf_counter()
        with clock.stage("fit"):
            found = _fitted(problem, fit_deadline)
            if found is None:
                reason = f"no time was left for a repair after {clock.elapsed:.1f} s; raise `max_time`."
                return Solution(None, reason)
            state, how = between(current_state(problem.model), found[0], FIT_STRENGTH), found[1]
            fitted = problem.propose("fit", state)
        steps = [fitted.step(time.perf_counter() - began, how)]
        # What comes after it can do without time, a polish that is cut short loses most of what was repaired.
        proposal, step, _ = polished(problem, fitted, steered=True)
        steps.append(step)
        if not proposal.repaired:
            reason = "no target was repaired without breaking what is right."
            return Solution(None, reason, tuple(steps), (fitted,))
        return Solution(proposal, steps=tuple(steps), others=(fitted,))


def _fitted(problem: Problem, deadline: Deadline) -> tuple[State, str] | None:
    seconds = deadline.agreed_seconds_left()
    if seconds > 0 and problem.whole and problem.training is not None:
        weight = visits_per_epoch(problem)
        train = problem.training if weight is None else partial(problem.training, weight=weight)
        state = train(seconds=seconds, seed=problem.seed, clock=problem.clock)
        if state is not None:
            return state, "continued training"
        seconds = deadline.agreed_seconds_left()
    return (distill(problem, deadline=deadline), "distilled steps") if seconds > 0 else None


def visits_per_epoch(problem: Problem) -> Tensor | None:
    """How often each sample is trained on in an epoch, `N`; None where all targets count alike."""
    before = problem.before
    weight = torch.where(before.targeted, before.weight.clamp(max=MAX_SAMPLE_WEIGHT), 1.0).where(problem.used, 0.0)
    return weight if bool((weight != 1).any()) else None
