"""The rungs of the default's ladder inside the chosen layer, what a rung is, and how long an epoch takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.state import changed
from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError, ReplayError
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.methods.budget import (
    EPOCHS_WORTH_TIME,
    EXACT_ALONE_TIME_SHARE,
    EXACT_TIME_SHARE,
    FIT_SHARE_OF_SEARCH,
    MIN_SEARCH_SECONDS,
    PASSES_PER_VISIT,
    POLISH_PASSES,
    SEARCH_TIME_SHARE,
    SOLVING_FACTOR,
    UNKNOWN_FIT_SECONDS,
)
from lightning_nrl.methods.convex import Convex
from lightning_nrl.methods.held_out import estimate
from lightning_nrl.methods.linearized import Linearized
from lightning_nrl.methods.problem import Method, Problem
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.methods.warm_start import warm_started_search
from lightning_nrl.report.run_records import Rung, Step
from lightning_nrl.search import Searcher

PATIENCE_OF_STRENGTHS = 3
"""See `Convex.patience`."""


@dataclass(frozen=True)
class RungResult:
    """What a rung gave.

    Attributes:
        name: as in `report.run_records.Rung`.
        solution: its proposal and the steps to it.
        seconds: wall time, the trial without held-out samples included.
        note: how it went, in words.
        tried: what became of the known samples under other weights that were counted on the way.
    """

    name: str
    solution: Solution
    seconds: float
    note: str = ""
    tried: tuple[TargetCounts, ...] = ()

    @property
    def held_out(self) -> TargetCounts | None:
        """What the procedure does to samples that it may not use."""
        return self.solution.held_out

    @property
    def usable(self) -> Proposal | None:
        """The proposal, if it repairs a target and keeps within the gate."""
        proposal = self.solution.proposal
        return proposal if proposal is not None and proposal.repaired and not proposal.excess else None

    def record(self, problem: Problem, taken: bool) -> Rung:
        """The rung as the report has it."""
        proposal = self.solution.proposal
        counts = (0, 0, 0, 0)
        if proposal is not None:
            found = problem.target_counts(proposal.after)
            counts = proposal.repaired, found.repaired, found.broken, weights_changed(problem, proposal)
        return Rung(self.name, *counts, round(self.seconds, 3), self.held_out, taken, self.note)


def weights_changed(problem: Problem, proposal: Proposal) -> int:
    """How many weights of the model's parameters a proposal changes."""
    live = dict(problem.model.named_parameters())
    new = changed(problem.model, proposal.state)
    return sum(int((live[k].detach() != v.to(live[k].device)).sum()) for k, v in new.items() if k in live)


def search_seconds(problem: Problem) -> float:
    """How long one search may take."""
    if math.isfinite(problem.clock.left):
        return SEARCH_TIME_SHARE * problem.clock.left
    fit = UNKNOWN_FIT_SECONDS if problem.training is None else problem.training.fit_seconds or UNKNOWN_FIT_SECONDS
    return max(MIN_SEARCH_SECONDS, FIT_SHARE_OF_SEARCH * fit)


def search_rung(problem: Problem, searcher: Searcher[Any], held_out: Tensor | None) -> RungResult:
    """Localises in the chosen layer and searches from the original weights; no known passed sample may break."""
    began = problem.clock.elapsed

    def search(problem: Problem) -> Solution:
        return _caught(problem, lambda: warm_started_search(problem, searcher, (), seconds=search_seconds(problem)))

    solution = search(problem)
    proposal = solution.proposal
    if held_out is not None and proposal is not None and proposal.repaired:
        trial = search(problem.without(held_out)).proposal
        if trial is not None:
            solution = replace(solution, held_out=estimate(problem.before, trial.after, held_out))
    return RungResult("search", solution, problem.clock.elapsed - began, _note(solution))


def exact_rung(problem: Problem, searcher: Searcher[Any], held_out: Tensor | None) -> RungResult | None:
    """Solves the chosen layer, and searches from there; None where the layer or the model does not suit.

    What comes of held-out samples is known of the solved weights, from which the search goes on.
    """
    began = problem.clock.elapsed
    convex = Convex(PATIENCE_OF_STRENGTHS, _solving_seconds(problem))
    for method in (convex, Linearized()) if is_one_layer(problem) else (convex,):
        try:
            name = type(method).__name__.lower()
            solution = _solved(problem, method, name)
            if held_out is not None and solution.held_out is None and solution.proposal is not None:
                trial = _solved(problem.without(held_out), method, name).proposal
                if trial is not None:
                    solution = replace(solution, held_out=estimate(problem.before, trial.after, held_out))
        except ConfigurationError:
            continue
        if solution.proposal is not None:
            last = search_or_keep(problem, searcher, solution.proposal, seconds=search_seconds(problem))
            solution = replace(last, steps=(*solution.steps, *last.steps), held_out=solution.held_out)
        return RungResult("exact", solution, problem.clock.elapsed - began, name)
    return None


def _solved(problem: Problem, method: Method, name: str) -> Solution:
    return problem.work.once(name, partial(_caught, problem, partial(method, problem), name=name), Solution)


def _solving_seconds(problem: Problem) -> float:
    if math.isinf(problem.clock.left):
        return SOLVING_FACTOR * search_seconds(problem)
    trains = problem.whole and leaves_time_for_epochs(problem, EPOCHS_WORTH_TIME, 1 - EXACT_TIME_SHARE)
    return (EXACT_TIME_SHARE if trains else EXACT_ALONE_TIME_SHARE) * problem.clock.left


def search_or_keep(problem: Problem, searcher: Searcher[Any], base: Proposal, *, seconds: float) -> Solution:
    """A search from a proposal on, which is kept as it is where nothing can be searched."""
    solution = _caught(
        problem, lambda: warm_started_search(problem, searcher, [base], base=base.state, seconds=seconds), base
    )
    return solution if solution.proposal is not None else replace(solution, proposal=base)


def is_one_layer(problem: Problem) -> bool:
    """Whether one layer alone may change, its bias included."""
    if len(problem.space.sites) != 1:
        return False
    site = problem.space.sites[0]
    prefix = f"{site.name}." if site.name else ""
    own = {f"{prefix}{name}" for name, _ in site.module.named_parameters(recurse=False)}
    return set(problem.scope) <= own


def _caught(
    problem: Problem, search: Callable[[], Solution], base: Proposal | None = None, name: str = "swarm"
) -> Solution:
    """What a search or a method gives; where there is nothing to search, or no memory for it, a line that says so."""
    try:
        return search()
    except (EmptyLocalizationError, ReplayError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
    except (RuntimeError, MemoryError) as error:
        # Of several ranks the others would wait for this one for ever.
        if problem.collective.world_size > 1 or not is_out_of_memory(error):
            raise
        reason = "out of memory"
    repaired, broken = (0, 0) if base is None else (base.repaired, base.broken)
    return Solution(None, f"{reason}.", (Step(name, repaired, broken, 0.0, f"not run: {reason}"),))


def _note(solution: Solution) -> str:
    return solution.steps[-1].note if solution.steps else solution.reason


def epoch_seconds(problem: Problem) -> float:
    """Of training over all known data, by the time that the fit took, or by that of one pass."""
    training, n = problem.training, len(problem.before)
    if training is None or training.fit_seconds is None:
        return PASSES_PER_VISIT * problem.clock.one_pass
    return n * training.fit_seconds / max(1, training.visits)


def leaves_time_for_epochs(problem: Problem, epochs: float, share: float) -> bool:
    """Whether a share of the time that is left is enough for so many epochs and a polish; always without a limit."""
    seconds = epochs * epoch_seconds(problem) + POLISH_PASSES * problem.clock.one_pass
    return problem.deadline_of_method().leaves(seconds / share)
