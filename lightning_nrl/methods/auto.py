"""`Auto`, the default method: tries repairs from the smallest change to the largest and takes one
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import lightning_nrl.methods.budget as budget
from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.state import changed
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError, ReplayError, check_kind
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.methods.convex import Convex
from lightning_nrl.methods.finetune_polish import fine_tune_and_polish, least_seconds
from lightning_nrl.methods.held_out import draw_held_out_rows, estimate, is_ahead, net_rate
from lightning_nrl.methods.linearized import Linearized
from lightning_nrl.methods.local_search import LocalSearch
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.polish_weights import Polish
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.methods.warm_start import warm_started_search
from lightning_nrl.records.steps import PricePoint, Rung, Step
from lightning_nrl.search import ParticleSwarm, Searcher

PATIENCE_OF_PRICES = 3  # `Convex.patience` in the rung `exact`
PRICE_LEVELS = (
    0.0,
    0.001,
    0.005,
    0.01,
    0.02,
    1.0,
)  # for `Solution.price`, shares of passed samples that may break


@dataclass(frozen=True)
class Auto(Method):
    """Tries up to three repairs, from the smallest change to the largest, and takes one of them.

    Each repair is called a rung. All rungs aim to break no known passed sample.

    - `search` always runs. It localises the weights of the chosen layer that matter for the
      failures. A swarm then searches new values for these weights, starting from the original
      values.
    - `exact` runs if the whole network or only one layer may change. It repairs the chosen layer
      with `Convex`, then searches from the result. If only one layer may change and `Convex` does
      not suit it, `Linearized` is used.
    - `training` runs if more than one layer may change. It continues the training, then polishes
      (`FineTunePolish`).
    - `polish` replaces `exact` and `training` in an update, where a new model replaces an old one.
      Small steps from the new model restore all samples that the old model got right (`Polish`). A
      search then starts from the result.

    If the task has no margins, only a `LocalSearch` runs. A rung can be taken if it repairs a
    target and the gate allows what it breaks. Its net rate is (repaired - broken) / passed on
    held-out samples, or 0 if none are held out.

    1. With quotas of slices, only the rungs stay that lack the fewest repairs to meet them.
    2. Rungs with a net rate below 0 are dropped, unless all net rates are below 0.
    3. Of rungs that repair equally much (by sample weight), only the rung with the highest net rate
       stays. On a tie in the net rate, only the rung with the smallest change stays.
    4. The smallest rung left is compared with each larger rung in turn, and the better of the two
       is kept. A larger rung that repairs more is better unless its net rate is significantly lower
       (by over two standard errors). A larger rung that repairs less, but at least half as much, is
       better if its net rate is significantly higher.

    Attributes:
        swarm: the searcher of the rungs that search. It may be a swarm or any other searcher.

    Raises:
        ConfigurationError: on construction, if `swarm` is no searcher.
    """

    trains: ClassVar[bool] = True
    swarm: ParticleSwarm | Searcher[Any] = field(
        default_factory=partial(ParticleSwarm, iterations=60)
    )

    def __post_init__(self) -> None:
        fits = isinstance(self.swarm, Searcher)
        check_kind("Auto.swarm", self.swarm, fits, "searcher", "Auto(ParticleSwarm(particles=50))")

    def __call__(self, problem: Problem) -> Solution:
        """Runs the rungs; raises an `EmptyLocalizationError` if only a `LocalSearch` runs and finds
        no weights.
        """
        if not bool(problem.before.margin.isfinite().all()):
            return LocalSearch(self.swarm)(problem)
        results = _Ladder(problem, self.swarm).run()
        number, why = chosen_rung(results)
        solutions = [result.solution for result in results]
        taken = Solution(None, why) if number is None else solutions[number]
        # The report shows the search of the rung taken, or the last search if no rung is taken.
        shown = (
            taken
            if number is not None
            else next((one for one in solutions[::-1] if one.result is not None), taken)
        )
        return Solution(
            taken.proposal,
            why if number is None else "",
            tuple(step for solution in solutions for step in solution.steps),
            localization=shown.localization,
            result=shown.result,
            n_passed=shown.n_passed,
            held_out=taken.held_out,
            rungs=tuple(result.record(problem, number == i) for i, result in enumerate(results)),
            choice="" if number is None else why,
            price=price_points(
                both for solution in solutions for both in _counted(problem, solution)
            ),
        )


@dataclass(frozen=True)
class RungResult:
    """The result of one rung. `seconds` includes a second run of the rung, which gives the held-out
    counts.
    """

    name: str
    solution: Solution
    seconds: float
    note: str = ""

    @property
    def usable(self) -> Proposal | None:
        """The proposal if it repairs a target and the gate allows what it breaks, else None."""
        proposal = self.solution.proposal
        return (
            proposal if proposal is not None and proposal.repaired and not proposal.excess else None
        )

    @property
    def was_cut(self) -> bool:
        """True if `max_time` shortened the rung or left no time for it."""
        steps = self.solution.steps
        return not steps or any(step.was_cut for step in steps)

    def record(self, problem: Problem, taken: bool) -> Rung:
        proposal, counts = self.solution.proposal, (0, 0, 0, 0)
        if proposal is not None:
            found, live = (
                problem.target_counts(proposal.after),
                dict(problem.model.named_parameters()),
            )
            new = {
                name: value
                for name, value in changed(problem.model, proposal.state).items()
                if name in live
            }
            n_changed = sum(
                int((live[k].detach() != v.to(live[k].device)).sum()) for k, v in new.items()
            )
            counts = proposal.repaired, found.repaired, found.broken, n_changed
        return Rung(
            self.name, *counts, round(self.seconds, 3), self.solution.held_out, taken, self.note
        )


class _Ladder:
    """Runs the rungs of `Auto`. Under `max_time` all rungs before `training` together get a part of
    the time.
    """

    def __init__(self, problem: Problem, searcher: Searcher[Any]) -> None:
        self.problem, self.searcher = problem, searcher
        self.is_one_layer = _is_one_layer(problem)
        self.held_out_rows = None if problem.update else draw_held_out_rows(problem)
        self.trains = not problem.update and not self.is_one_layer
        whole = problem.deadline_of_method()
        share = 1.0
        if self.trains and whole.leaves(least_seconds(problem)):
            hurries = not whole.leaves(least_seconds(problem, budget.FEW_EPOCHS))
            share = budget.HURRIED_SEARCH_TIME_SHARE if hurries else budget.SEARCH_TIME_SHARE
        self.shares_time = whole.is_set and share < 1
        self.end = whole.within(share * whole.agreed_seconds_left()) if whole.is_set else whole

    def run(self) -> list[RungResult]:
        """Runs all rungs. If time is left, rungs that `max_time` cut run again, and the better
        result counts.
        """
        problem = self.problem
        rungs: dict[str, Callable[[], Solution | None]] = {"search": self._search}
        if problem.update:
            rungs["polish"] = self._polish
        elif problem.whole or self.is_one_layer:
            rungs["exact"] = self._exact
        if self.trains:
            rungs["training"] = self._training
        found = {name: self._run_rung(name, solve) for name, solve in rungs.items()}
        results = {name: result for name, result in found.items() if result is not None}
        if self.shares_time:
            self.end = problem.deadline_of_method()
            for name in [
                name for name, result in results.items() if name != "training" and result.was_cut
            ]:
                again, best = self._run_rung(name, rungs[name]), results[name].usable
                if again is None:
                    continue
                is_better = again.usable is not None and (
                    best is None or again.usable.rank > best.rank
                )
                if is_better or (best is None and not again.was_cut):
                    results[name] = again
        return list(results.values())

    def _run_rung(self, name: str, solve: Callable[[], Solution | None]) -> RungResult | None:
        return self.problem.work.once(name, partial(self._timed, name, solve), RungResult)

    def _timed(self, name: str, solve: Callable[[], Solution | None]) -> RungResult | None:
        began = self.problem.clock.elapsed
        solution = solve()
        if solution is None:
            return None
        note = solution.steps[-1].note if solution.steps else solution.reason
        return RungResult(name, solution, self.problem.clock.elapsed - began, note)

    def _search(self) -> Solution:
        def search(problem: Problem) -> Solution:
            return _safely(
                problem,
                lambda: warm_started_search(problem, self.searcher, (), end=self._within(1 / 4)),
            )

        solution = search(self.problem)
        return (
            self._add_held_out(solution, search)
            if solution.proposal and solution.proposal.repaired
            else solution
        )

    def _exact(self) -> Solution | None:
        """Repairs the chosen layer by a solver, then searches. Returns None if no solver suits the
        layer or task.
        """
        seconds = budget.EXACT_TIME_SHARE * self.end.agreed_seconds_left()
        convex = Convex(PATIENCE_OF_PRICES, seconds, budget.MAX_PAIRS)
        for method in (convex, Linearized()) if self.is_one_layer else (convex,):
            solve = partial(_solved, method=method)
            try:
                solution = self._add_held_out(solve(self.problem), solve)
            except ConfigurationError:
                continue
            if solution.proposal is not None:
                last = self._searched_from(solution.proposal, self.end)
                # The held-out samples are not counted again after the search.
                solution = replace(
                    last, steps=(*solution.steps, *last.steps), held_out=solution.held_out
                )
            return solution
        return None

    def _training(self) -> Solution:
        return fine_tune_and_polish(self.problem, self.held_out_rows)

    def _polish(self) -> Solution:
        """Polishes the new model, then searches from the result. No samples are held out."""
        solution = Polish(share=budget.UPDATE_TIME_SHARE)(self.problem)
        if solution.proposal is None:
            return solution
        last = self._searched_from(solution.proposal, self.problem.deadline_of_method())
        return replace(last, steps=(*solution.steps, *last.steps))

    def _searched_from(self, base: Proposal, end: Deadline) -> Solution:
        search = partial(
            warm_started_search, self.problem, self.searcher, [base], base=base.state, end=end
        )
        solution = _safely(self.problem, search, base)
        return replace(solution, proposal=solution.proposal or base)

    def _add_held_out(self, solution: Solution, solve: Callable[[Problem], Solution]) -> Solution:
        """If a solution has no held-out counts, solves again without the held-out samples and
        counts their flips.
        """
        if self.held_out_rows is None or solution.held_out is not None or solution.proposal is None:
            return solution
        trial = solve(self.problem.without(self.held_out_rows))
        # A trial that has no time returns the original weights and a reason. Counts of these would
        # be no estimate.
        if trial.proposal is None or trial.reason:
            return solution
        return replace(
            solution,
            held_out=estimate(self.problem.before, trial.proposal.after, self.held_out_rows),
        )

    def _within(self, share: float) -> Deadline:
        return (
            self.end.within(share * self.end.agreed_seconds_left()) if self.end.is_set else self.end
        )


def chosen_rung(results: Sequence[RungResult]) -> tuple[int | None, str]:
    """Chooses a rung by the rules of `Auto`. Returns its index, or None if no rung can be taken,
    and the reason.
    """
    usable = {i: one for i, result in enumerate(results) if (one := result.usable) is not None}
    if not usable:
        given = (result.solution.reason for result in results if result.solution.reason)
        reasons = dict.fromkeys(f"{reason[0].upper()}{reason[1:]}" for reason in given)
        return None, " ".join(reasons) or "no rung repairs a target within the gate."
    fewest = min(one.missing for one in usable.values())
    counts = {i: results[i].solution.held_out for i, one in usable.items() if one.missing == fewest}
    harmless = [i for i in counts if net_rate(counts[i]) >= 0] or list(counts)
    best_of_value: dict[
        float, int
    ] = {}  # from the value of repairs to the rung with the highest net rate
    for i in harmless:
        other = best_of_value.get(usable[i].value)
        if other is None or net_rate(counts[i]) > net_rate(counts[other]):
            best_of_value[usable[i].value] = i
    best, *larger = sorted(best_of_value.values())
    for i in larger:
        if is_ahead(usable[i].value, counts[i], usable[best].value, counts[best]):
            best = i
    return best, _choice(results, best)


def _choice(results: Sequence[RungResult], best: int) -> str:
    taken = results[best]
    text = f"`{taken.name}` is taken: it {_repairs(taken)}."
    for other in (*results[:best], *results[best + 1 :]):
        none = f"has no result: {other.solution.reason or 'it repairs no target within the gate.'}"
        text += f" `{other.name}` {f'{_repairs(other)}.' if other.usable else none}"
    return text


def _repairs(result: RungResult) -> str:
    proposal, counts = result.solution.proposal, result.solution.held_out
    n = 0 if proposal is None else proposal.repaired
    text = f"repairs {n:,} target{'s' * (n != 1)}"
    if counts is None:
        return text
    repaired, broken = (
        f"{counts.repaired:,} of {counts.n - counts.passed:,}",
        f"{counts.broken:,} of {counts.passed:,}",
    )
    return f"{text}; of the held-out samples it repairs {repaired} failed and breaks {broken} passed ones"


Counted = tuple[
    TargetCounts, TargetCounts | None
]  # counts of all known samples, and of the held-out samples or None


def _counted(problem: Problem, solution: Solution) -> Iterator[Counted]:
    for proposal in (solution.proposal, *solution.others):
        if proposal is not None:
            yield problem.target_counts(proposal.after), solution.held_out
    for counts in solution.tried:
        yield counts, solution.held_out


def price_points(counted: Iterable[Counted]) -> tuple[PricePoint, ...]:
    """Returns, for each share in `PRICE_LEVELS`, the counts with most repairs in which at most this
    share breaks.
    """
    counted, points = list(counted), []
    for level in PRICE_LEVELS:
        within = [both for both in counted if both[0].broken <= level * both[0].passed]
        if within:
            known, held_out = max(
                within,
                key=lambda both: (both[0].repaired_in_target, -both[0].broken, both[0].repaired),
            )
            points.append(
                PricePoint(level, known.broken, known.repaired_in_target, known.repaired, held_out)
            )
    return tuple(points)


def _is_one_layer(problem: Problem) -> bool:
    if len(problem.space.sites) != 1:
        return False
    site = problem.space.sites[0]
    prefix = f"{site.name}." if site.name else ""
    return set(problem.scope) <= {
        f"{prefix}{name}" for name, _ in site.module.named_parameters(recurse=False)
    }


def _solved(problem: Problem, method: Method) -> Solution:
    name = type(method).__name__.lower()
    return problem.work.once(
        name, partial(_safely, problem, partial(method, problem), name=name), Solution
    )


def _safely(
    problem: Problem,
    search: Callable[[], Solution],
    base: Proposal | None = None,
    name: str = "swarm",
) -> Solution:
    """Runs a search or method; if it finds no weights or lacks memory, returns a solution with only
    a reason.
    """
    try:
        return search()
    except (EmptyLocalizationError, ReplayError) as error:
        reason = error.problem.rstrip(".")
    except (RuntimeError, MemoryError) as error:
        # One of several ranks must not go on alone: the others would wait for it forever.
        if problem.collective.world_size > 1 or not is_out_of_memory(error):
            raise
        reason = "out of memory"
    repaired, broken = (0, 0) if base is None else (base.repaired, base.broken)
    return Solution(None, f"{reason}.", (Step(name, repaired, broken, 0.0, f"not run: {reason}"),))
