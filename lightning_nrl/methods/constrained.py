"""Fit, then polish: repair as many as possible first, then bring back all that broke on the way."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from lightning_nrl.fit import fit
from lightning_nrl.methods.problem import Problem, Solution
from lightning_nrl.polish import check_margin, polish
from lightning_nrl.state import State

__all__ = ["Constrained"]

POLISH = 12.0
"""Passes over known data that a polish takes; so much time is kept for it."""
JUDGE = 3.0
"""Passes that are left when it is over: what the fit did is counted, the result is judged, unseen data are counted."""


@dataclass(frozen=True)
class Constrained:
    """Repairs under the constraint that no known passed sample breaks.

    Where the whole network may change and it is known how it was trained, the training goes on from the old weights
    with the failed data added: more is repaired, and less breaks on unseen data, than by a training from scratch.
    Else, for a layer or a block, or where time is too short for that, it makes distilled steps of its own
    (`lightning_nrl.fit`). A polish (`lightning_nrl.polish`) then brings back every known passed sample that broke.
    """

    def __call__(self, problem: Problem) -> Solution:
        """Fits and polishes.

        Raises:
            ConfigurationError: the task has no margins.
        """
        check_margin(problem)
        clock, one_pass = problem.clock, problem.clock.seconds.get("collect", 0.0)
        seconds = _agreed(problem, clock.left - (POLISH + JUDGE) * one_pass)
        if seconds <= 0:
            return Solution(None, f"no time was left for a repair after {clock.elapsed:.1f} s; raise `max_time`.")
        began = time.perf_counter()
        with clock.stage("fit"):
            state, how = _fitted(problem, seconds)
            fitted = problem.propose("fit", state)
        steps = [fitted.step(time.perf_counter() - began, how)]
        began = time.perf_counter()
        with clock.stage("polish"):
            seconds = _agreed(problem, clock.left - JUDGE * one_pass)
            polished = polish(problem, state, seconds=seconds, after=fitted.after)
        proposal = problem.counted("polish", polished.state, polished.after)
        note = f"{polished.rounds} rounds"
        if polished.strength < 1:
            note += f", then back to {polished.strength:.0%} of the way"
        steps.append(proposal.step(time.perf_counter() - began, note))
        if not proposal.repaired:
            reason = "no target was repaired without breaking what is right."
            return Solution(None, reason, steps=tuple(steps), others=(fitted,))
        return Solution(proposal, steps=tuple(steps), others=(fitted,))


def _fitted(problem: Problem, seconds: float) -> tuple[State, str]:
    """Weights that repair, and in words how they came about."""
    if problem.whole and problem.training is not None:
        began = time.perf_counter()
        state = problem.training(seconds=seconds, seed=problem.seed, clock=problem.clock)
        if state is not None:
            return state, "continued training"
        seconds -= time.perf_counter() - began
    return fit(problem, seconds=_agreed(problem, seconds)), "distilled steps"


def _agreed(problem: Problem, seconds: float) -> float:
    """The first rank's time."""
    if math.isinf(seconds) or problem.collective.world_size == 1:
        return seconds
    return float(problem.collective.agreed(torch.tensor(seconds, dtype=torch.float64)))
