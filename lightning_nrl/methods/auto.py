"""The default: a ladder of rungs, from the least change to the most; held-out data say which is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from lightning_nrl.errors import check_kind
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.methods.auto_rungs import RungResult, exact_rung, is_one_layer, search_or_keep, search_rung
from lightning_nrl.methods.auto_training import training_rung
from lightning_nrl.methods.budget import UPDATE_TIME_SHARE
from lightning_nrl.methods.held_out import best_index, held_out_rows
from lightning_nrl.methods.local_search import LocalSearch
from lightning_nrl.methods.polish_weights import Polish
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Solution
from lightning_nrl.report.run_records import PricePoint, Step, choice_text
from lightning_nrl.search import ParticleSwarm, Searcher
from lightning_nrl.search.loop import TIME_WAS_OVER


@dataclass(frozen=True)
class Auto:
    """Localises and searches first, then goes as far as it pays.

    1. `search`: the weights of the chosen layer that matter for the failures are localised, and a swarm searches them
       from the original weights on, every known passed sample a constraint.
    2. `exact`: the layer's programmes are solved (`Convex`, or `Linearized` where one inner layer alone may change),
       and the swarm searches again from there.
    3. `training`, where more than one layer may change: the training goes on and is polished, then what is left is
       localised and searched. In an update the new model is polished until what it broke is right again (`Polish`).

    Each rung is also tried on samples that it may not use; the last rung that nothing speaks against is taken, these
    samples or a cheaper rung that repairs more. A task without margins has the first rung alone.

    Attributes:
        swarm: what searches, a swarm or another searcher.

    Raises:
        ConfigurationError: on construction, if `swarm` is no searcher.
    """

    trains: ClassVar[bool] = True
    swarm: ParticleSwarm | Searcher[Any] = field(default_factory=partial(ParticleSwarm, iterations=60))

    def __post_init__(self) -> None:
        fits = isinstance(self.swarm, Searcher)
        check_kind("Auto.swarm", self.swarm, fits, "searcher", "Auto(ParticleSwarm(particles=50))")

    def __call__(self, problem: Problem) -> Solution:
        """Climbs; an `EmptyLocalizationError` if the local search alone can be used and has no weights to search."""
        if not bool(problem.before.margin.isfinite().all()):
            return LocalSearch(self.swarm)(problem)
        results = list(_rungs(problem, self.swarm))
        number, why = chosen_rung(results)
        steps = [step for result in results for step in result.solution.steps]
        if number is not None:
            results[number], more = _searched_on(problem, self.swarm, results[number])
            steps.extend(more)
        taken = Solution(None, why) if number is None else results[number].solution
        solutions = [result.solution for result in results]
        shown = next((one for one in (taken, *reversed(solutions)) if one.result is not None), taken)
        rungs = tuple(result.record(problem, number == i) for i, result in enumerate(results))
        return Solution(
            taken.proposal,
            why if number is None else "",
            tuple(steps),
            localization=shown.localization,
            result=shown.result,
            n_passed=shown.n_passed,
            held_out=taken.held_out,
            rungs=rungs,
            choice="" if number is None else choice_text(rungs, why),
            price=price_points(both for solution in solutions for both in _counted(problem, solution)),
        )


def _rungs(problem: Problem, searcher: Searcher[Any]) -> Iterator[RungResult]:
    """Rung by rung; those that were climbed before the process was killed are not climbed again."""
    one_layer = is_one_layer(problem)
    held_out = None if problem.update else held_out_rows(problem)
    rungs: dict[str, Callable[[], RungResult | None]] = {"search": partial(search_rung, problem, searcher, held_out)}
    if problem.update:
        rungs["polish"] = partial(_update_rung, problem, searcher)
    elif problem.whole or one_layer:
        rungs["exact"] = partial(exact_rung, problem, searcher, held_out)
    if not problem.update and not one_layer:
        rungs["training"] = partial(training_rung, problem, searcher, held_out)
    for name, climb in rungs.items():
        result = problem.work.once(name, climb, RungResult)
        if result is not None:
            yield result


def _update_rung(problem: Problem, searcher: Searcher[Any]) -> RungResult:
    """The new model's regressions come back by a polish; no trial, since few samples are like them."""
    began = problem.clock.elapsed
    solution = Polish(share=UPDATE_TIME_SHARE)(problem)
    if solution.proposal is not None:
        solution = search_or_keep(problem, searcher, solution.proposal, steps=solution.steps)
    return RungResult("polish", solution, problem.clock.elapsed - began)


def _searched_on(problem: Problem, searcher: Searcher[Any], result: RungResult) -> tuple[RungResult, tuple[Step, ...]]:
    """The rung that is taken, searched on in the time that was kept for training if that came to nothing; the steps."""
    base, start = result.solution, result.solution.proposal
    cut_short = base.result is not None and base.result.stopped == TIME_WAS_OVER
    if start is None or result.name not in ("search", "exact") or not cut_short or math.isinf(problem.deadline.end):
        return result, ()
    began = problem.clock.elapsed
    last = problem.work.once("search on", lambda: search_or_keep(problem, searcher, start, seconds=math.inf), Solution)
    if last.result is None:
        return result, ()
    solution = replace(last, held_out=base.held_out, others=(*base.others, start), tried=base.tried)
    return replace(result, solution=solution, seconds=result.seconds + problem.clock.elapsed - began), last.steps


def chosen_rung(results: Sequence[RungResult]) -> tuple[int | None, str]:
    """The rung to take and why, in a sentence; without one, why there is none.

    Rungs that give slices less of what they need than others are out of the question.
    """
    usable = {i: one for i, result in enumerate(results) if (one := result.usable) is not None}
    if not usable:
        reasons = dict.fromkeys(r.solution.reason for r in results if r.solution.reason)
        return None, " ".join(reasons) or "no rung repairs a target within the gate."
    fewest = min(one.missing for one in usable.values())
    usable = {i: one for i, one in usable.items() if one.missing == fewest}
    estimates = [results[i].solution.held_out for i in usable]
    if any(counts is None for counts in estimates):
        best = max(usable, key=lambda i: (*usable[i].rank, i))
        return best, f"`{results[best].name}` repairs most."
    best = list(usable)[best_index(estimates, [one.gain for one in usable.values()])]
    return best, f"`{results[best].name}` is taken: held-out samples do not speak against it."


Counted = tuple[TargetCounts, TargetCounts | None]
"""Counts of all known samples under some weights, and of held-out ones under the procedure, if it was tried."""


def _counted(problem: Problem, solution: Solution) -> Iterator[Counted]:
    for proposal in (solution.proposal, *solution.others):
        if proposal is not None:
            yield problem.target_counts(proposal.after), solution.held_out
    for counts in solution.tried:
        yield counts, solution.held_out


PRICE_LEVELS = (0.0, 0.001, 0.005, 0.01, 0.02, 1.0)  # shares of the known passed samples that might break


def price_points(counted: Iterable[Counted]) -> tuple[PricePoint, ...]:
    """A point for each level; levels within which nothing was counted are left out."""
    counted, points = list(counted), []
    for level in PRICE_LEVELS:
        within = [both for both in counted if both[0].broken <= level * both[0].passed]
        if within:
            known, held_out = max(
                within, key=lambda both: (both[0].repaired_in_target, -both[0].broken, both[0].repaired)
            )
            points.append(PricePoint(level, known.broken, known.repaired_in_target, known.repaired, held_out))
    return tuple(points)
