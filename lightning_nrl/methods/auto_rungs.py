"""The rungs of the default's ladder inside the chosen layer, what a rung is, and how long an epoch takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

import lightning_nrl.methods.budget as budget
from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.state import changed
from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError, ReplayError
from lightning_nrl.methods.convex import Convex
from lightning_nrl.methods.held_out import estimate
from lightning_nrl.methods.linearized import Linearized
from lightning_nrl.methods.problem import Method, Problem
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.methods.warm_start import warm_started_search
from lightning_nrl.report.run_records import Rung, Step
from lightning_nrl.search import Searcher

PATIENCE_OF_STRENGTHS = 3  # of `Convex`


@dataclass(frozen=True)
class RungResult:
    """A rung's solution, its seconds with the trial, and a note on how it went."""

    name: str
    solution: Solution
    seconds: float
    note: str = ""

    @property
    def usable(self) -> Proposal | None:
        """The proposal, if it repairs a target and keeps within the gate."""
        proposal = self.solution.proposal
        return proposal if proposal is not None and proposal.repaired and not proposal.excess else None

    def record(self, problem: Problem, taken: bool) -> Rung:
        """The rung as the report has it."""
        proposal, counts = self.solution.proposal, (0, 0, 0, 0)
        if proposal is not None:
            found, live = problem.target_counts(proposal.after), dict(problem.model.named_parameters())
            new = {name: value for name, value in changed(problem.model, proposal.state).items() if name in live}
            n_changed = sum(int((live[k].detach() != v.to(live[k].device)).sum()) for k, v in new.items())
            counts = proposal.repaired, found.repaired, found.broken, n_changed
        return Rung(self.name, *counts, round(self.seconds, 3), self.solution.held_out, taken, self.note)


def search_seconds(problem: Problem) -> float:
    """How long one search may take."""
    if math.isfinite(problem.clock.left):
        return budget.SEARCH_TIME_SHARE * problem.clock.left
    fit = (
        budget.UNKNOWN_FIT_SECONDS
        if problem.training is None
        else problem.training.fit_seconds or budget.UNKNOWN_FIT_SECONDS
    )
    return max(budget.MIN_SEARCH_SECONDS, budget.FIT_SHARE_OF_SEARCH * fit)


def epoch_seconds(problem: Problem) -> float:
    """Of training over all known data, by the time that the fit took, or by that of one pass."""
    training, n = problem.training, len(problem.before)
    if training is None or training.fit_seconds is None:
        return budget.PASSES_PER_VISIT * problem.clock.one_pass
    return n * training.fit_seconds / max(1, training.visits)


def search_rung(problem: Problem, searcher: Searcher[Any], held_out: Tensor | None) -> RungResult:
    """Localises in the chosen layer and searches from the original weights; no known passed sample may break."""
    began = problem.clock.elapsed

    def search(problem: Problem) -> Solution:
        return _caught(problem, lambda: warm_started_search(problem, searcher, (), seconds=search_seconds(problem)))

    solution = search(problem)
    if solution.proposal is not None and solution.proposal.repaired:
        solution = _tried_out(problem, solution, held_out, search)
    note = solution.steps[-1].note if solution.steps else solution.reason
    return RungResult("search", solution, problem.clock.elapsed - began, note)


def exact_rung(problem: Problem, searcher: Searcher[Any], held_out: Tensor | None) -> RungResult | None:
    """Solves the chosen layer, and searches from there; None where the layer or the model does not suit.

    What comes of held-out samples is known of the solved weights, from which the search goes on.
    """
    began = problem.clock.elapsed
    convex = Convex(PATIENCE_OF_STRENGTHS, _solving_seconds(problem))
    for method in (convex, Linearized()) if is_one_layer(problem) else (convex,):
        name, solve = type(method).__name__.lower(), partial(_solved, method=method)
        try:
            solution = _tried_out(problem, solve(problem), held_out, solve)
        except ConfigurationError:
            continue
        if solution.proposal is not None:
            last = search_or_keep(problem, searcher, solution.proposal, steps=solution.steps)
            solution = replace(last, held_out=solution.held_out)
        return RungResult("exact", solution, problem.clock.elapsed - began, name)
    return None


def search_or_keep(
    problem: Problem,
    searcher: Searcher[Any],
    base: Proposal,
    *,
    seconds: float | None = None,
    steps: Sequence[Step] = (),
) -> Solution:
    """A search from a proposal on, which is kept as it is where nothing can be searched.

    It takes `search_seconds` unless said otherwise; `steps` go before its own.
    """
    seconds = search_seconds(problem) if seconds is None else seconds
    search = partial(warm_started_search, problem, searcher, [base], base=base.state, seconds=seconds)
    solution = _caught(problem, search, base)
    return replace(solution, proposal=solution.proposal or base, steps=(*steps, *solution.steps))


def is_one_layer(problem: Problem) -> bool:
    """True if one layer alone may change, its bias included."""
    if len(problem.space.sites) != 1:
        return False
    site = problem.space.sites[0]
    prefix = f"{site.name}." if site.name else ""
    return set(problem.scope) <= {f"{prefix}{name}" for name, _ in site.module.named_parameters(recurse=False)}


def _solved(problem: Problem, method: Method) -> Solution:
    name = type(method).__name__.lower()
    return problem.work.once(name, partial(_caught, problem, partial(method, problem), name=name), Solution)


def _solving_seconds(problem: Problem) -> float:
    if math.isinf(problem.clock.left):
        return budget.SOLVING_FACTOR * search_seconds(problem)
    training = budget.EPOCHS_WORTH_TIME * epoch_seconds(problem) + budget.POLISH_PASSES * problem.clock.one_pass
    trains = problem.whole and problem.deadline_of_method().leaves(training / (1 - budget.EXACT_TIME_SHARE))
    return (budget.EXACT_TIME_SHARE if trains else budget.EXACT_ALONE_TIME_SHARE) * problem.clock.left


def _tried_out(
    problem: Problem, solution: Solution, held_out: Tensor | None, solve: Callable[[Problem], Solution]
) -> Solution:
    """The solution with what a trial without the held-out samples did to them, unless that is known."""
    if held_out is None or solution.held_out is not None or solution.proposal is None:
        return solution
    trial = solve(problem.without(held_out)).proposal
    return solution if trial is None else replace(solution, held_out=estimate(problem.before, trial.after, held_out))


def _caught(
    problem: Problem, search: Callable[[], Solution], base: Proposal | None = None, name: str = "swarm"
) -> Solution:
    """Runs a search or a method; where there is nothing to search, or no memory, the step says so."""
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
