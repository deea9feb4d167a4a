"""`Auto`, the default method: tries repairs from the smallest to the largest and takes one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import lightning_nrl.methods.budget as budget
from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.formatting import plural
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
from lightning_nrl.search import SEARCHERS, ParticleSwarm, Searcher

PATIENCE_OF_PRICES = 3  # `Convex.patience` in the rung `exact`
# For `Solution.price`, shares of passed samples that may break.
PRICE_LEVELS = (0.0, 0.001, 0.005, 0.01, 0.02, 1.0)


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
        swarm: the searcher of the rungs that search. It may be a swarm or any other searcher. None
            means a `ParticleSwarm` with 60 iterations.

    Raises:
        ConfigurationError: on construction, if `swarm` is no searcher.
    """

    trains: ClassVar[bool] = True
    swarm: Searcher | None = None

    def __post_init__(self) -> None:
        if self.swarm is None:
            # Not the default of the field, which a YAML parser would read as a dict.
            object.__setattr__(self, "swarm", ParticleSwarm(iterations=60))
        fits = isinstance(self.swarm, Searcher)
        check_kind("Auto.swarm", self.swarm, fits, "searcher", "Auto(ParticleSwarm(particles=50))")

    def __call__(self, problem: Problem) -> Solution:
        """Runs the rungs.

        Raises an `EmptyLocalizationError` if only a `LocalSearch` runs and finds no weights.
        """
        searcher = SEARCHERS.parse("Auto.swarm", self.swarm)
        if not bool(problem.before.margin.isfinite().all()):
            return LocalSearch(searcher)(problem)
        results = _Ladder(problem, searcher).run()
        solutions = [result.solution for result in results]
        index, why = chosen_rung(results)
        if index is None:
            taken, reason, choice = Solution(None), why, ""
            shown = _last_search(solutions)
        else:
            taken, reason, choice = solutions[index], "", why
            shown = taken
        return Solution(
            taken.proposal,
            reason,
            tuple(step for solution in solutions for step in solution.steps),
            localization=shown.localization,
            result=shown.result,
            n_passed=shown.n_passed,
            held_out=taken.held_out,
            rungs=tuple(result.record(problem, i == index) for i, result in enumerate(results)),
            choice=choice,
            price=price_points(_counted(problem, solutions)),
        )


def _last_search(solutions: Sequence[Solution]) -> Solution:
    for solution in reversed(solutions):
        if solution.result is not None:
            return solution
    return Solution(None)


@dataclass(frozen=True)
class RungResult:
    """The result of one rung.

    `seconds` includes a second run of the rung, which gives the held-out counts.
    """

    name: str
    solution: Solution
    seconds: float
    note: str = ""

    @property
    def usable(self) -> Proposal | None:
        """The proposal if it repairs a target and the gate allows what it breaks, else None."""
        proposal = self.solution.proposal
        if proposal is None or not proposal.repaired or proposal.excess:
            return None
        return proposal

    @property
    def was_cut(self) -> bool:
        """True if `max_time` shortened the rung or left no time for it."""
        steps = self.solution.steps
        return not steps or any(step.was_cut for step in steps)

    def record(self, problem: Problem, taken: bool) -> Rung:
        proposal, held_out = self.solution.proposal, self.solution.held_out
        seconds = round(self.seconds, 3)
        rung = Rung(self.name, 0, 0, 0, 0, seconds, held_out, taken, self.note)
        if proposal is None:
            return rung
        counts = problem.target_counts(proposal.after)
        return replace(
            rung,
            repaired_in_target=proposal.repaired,
            repaired=counts.repaired,
            broken=counts.broken,
            weights_changed=_n_changed(problem, proposal),
        )


def _n_changed(problem: Problem, proposal: Proposal) -> int:
    """Counts the parameters, without buffers, that a proposal changes."""
    parameters = dict(problem.model.named_parameters())
    n_changed = 0
    for name, value in changed(problem.model, proposal.state).items():
        if name in parameters:
            old = parameters[name].detach()
            n_changed += int((old != value.to(old.device)).sum())
    return n_changed


class _Ladder:
    """Runs the rungs of `Auto`.

    Under `max_time` all rungs before `training` together get a part of the time.
    """

    def __init__(self, problem: Problem, searcher: Searcher) -> None:
        self.problem = problem
        self.searcher = searcher
        self.is_one_layer = _is_one_layer(problem)
        self.held_out_rows = None if problem.update else draw_held_out_rows(problem)
        self.trains = not problem.update and not self.is_one_layer
        self.end = problem.deadline_of_method()  # of the rungs before `training`
        share = self._time_share_before_training()
        self.shares_time = self.end.is_set and share < 1
        self.end = self._within(share)

    def _time_share_before_training(self) -> float:
        if not self.trains or not self.end.leaves(least_seconds(self.problem)):
            return 1.0
        if self.end.leaves(least_seconds(self.problem, budget.FEW_EPOCHS)):
            return budget.SEARCH_TIME_SHARE
        return budget.HURRIED_SEARCH_TIME_SHARE

    def _within(self, share: float) -> Deadline:
        if not self.end.is_set:
            return self.end
        return self.end.within(share * self.end.agreed_seconds_left())

    def run(self) -> list[RungResult]:
        """Runs all rungs.

        If time is left, rungs that `max_time` cut run again, and the better result counts.
        """
        rungs: dict[str, Callable[[], Solution | None]] = {"search": self._search}
        if self.problem.update:
            rungs["polish"] = self._polish
        elif self.problem.whole_network or self.is_one_layer:
            rungs["exact"] = self._exact
        if self.trains:
            rungs["training"] = self._training
        results: dict[str, RungResult] = {}
        for name, solve in rungs.items():
            result = self._run_rung(name, solve)
            if result is not None:
                results[name] = result
        if self.shares_time:
            self.end = self.problem.deadline_of_method()
            for name, result in list(results.items()):
                if name != "training" and result.was_cut:
                    again = self._run_rung(name, rungs[name])
                    results[name] = _better_result(result, again)
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
            end = self._within(1 / 4)
            return _safely(
                problem, partial(warm_started_search, problem, self.searcher, (), end=end)
            )

        solution = search(self.problem)
        if solution.proposal is None or not solution.proposal.repaired:
            return solution
        return self._add_held_out(solution, search)

    def _exact(self) -> Solution | None:
        """Repairs the chosen layer by a solver, then searches.

        Returns None if no solver suits the layer or task.
        """
        seconds = budget.EXACT_TIME_SHARE * self.end.agreed_seconds_left()
        methods: list[Method] = [Convex(PATIENCE_OF_PRICES, seconds, budget.MAX_PAIRS)]
        if self.is_one_layer:
            methods.append(Linearized())
        for method in methods:
            solve = partial(_solve, method=method)
            try:
                solution = self._add_held_out(solve(self.problem), solve)
            except ConfigurationError:
                continue
            if solution.proposal is None:
                return solution
            # The held-out samples are not counted again after the search.
            return replace(self._search_from(solution, self.end), held_out=solution.held_out)
        return None

    def _training(self) -> Solution:
        return fine_tune_and_polish(self.problem, self.held_out_rows)

    def _polish(self) -> Solution:
        """Polishes the new model, then searches from the result. No samples are held out."""
        solution = Polish(share=budget.UPDATE_TIME_SHARE)(self.problem)
        if solution.proposal is None:
            return solution
        return self._search_from(solution, self.problem.deadline_of_method())

    def _search_from(self, start: Solution, end: Deadline) -> Solution:
        """Searches from the proposal of a solution. The result has the steps of both."""
        base = start.proposal
        assert base is not None
        search = partial(
            warm_started_search, self.problem, self.searcher, [base], base=base.state, end=end
        )
        solution = _safely(self.problem, search, base)
        return replace(
            solution,
            proposal=solution.proposal or base,
            steps=(*start.steps, *solution.steps),
        )

    def _add_held_out(self, solution: Solution, solve: Callable[[Problem], Solution]) -> Solution:
        """Solves again without the held-out samples and counts their flips, unless that is done."""
        if self.held_out_rows is None or solution.held_out is not None or solution.proposal is None:
            return solution
        trial = solve(self.problem.without(self.held_out_rows))
        # A trial that has no time returns the original weights and a reason. Counts of these would
        # be no estimate.
        if trial.proposal is None or trial.reason:
            return solution
        counts = estimate(self.problem.before, trial.proposal.after, self.held_out_rows)
        return replace(solution, held_out=counts)


def _better_result(first: RungResult, second: RungResult | None) -> RungResult:
    """Compares a rung that was cut with a second run."""
    if second is None:
        return first
    if first.usable is None:
        return first if second.was_cut and second.usable is None else second
    if second.usable is None or second.usable.rank <= first.usable.rank:
        return first
    return second


def chosen_rung(results: Sequence[RungResult]) -> tuple[int | None, str]:
    """Chooses a rung by the rules of `Auto`.

    Returns its index, or None if no rung can be taken, and the reason.
    """
    usable: dict[int, Proposal] = {}
    for i, result in enumerate(results):
        if result.usable is not None:
            usable[i] = result.usable
    if not usable:
        return None, _why_none(results)
    fewest = min(proposal.missing for proposal in usable.values())
    counts = {
        i: results[i].solution.held_out
        for i, proposal in usable.items()
        if proposal.missing == fewest
    }
    harmless = [i for i in counts if net_rate(counts[i]) >= 0] or list(counts)
    best_of_value: dict[float, int] = {}  # the rung with the highest net rate, by value of repairs
    for i in harmless:
        rival = best_of_value.setdefault(usable[i].value, i)
        if net_rate(counts[i]) > net_rate(counts[rival]):
            best_of_value[usable[i].value] = i
    best, *larger = sorted(best_of_value.values())
    for i in larger:
        if is_ahead(usable[i].value, counts[i], usable[best].value, counts[best]):
            best = i
    return best, _choice(results, best)


def _why_none(results: Sequence[RungResult]) -> str:
    reasons = [result.solution.reason for result in results if result.solution.reason]
    sentences = dict.fromkeys(f"{reason[0].upper()}{reason[1:]}" for reason in reasons)
    return " ".join(sentences) or "no rung repairs a target within the gate."


def _choice(results: Sequence[RungResult], best: int) -> str:
    taken = results[best]
    text = f"`{taken.name}` is taken: it {_repairs(taken)}."
    for i, result in enumerate(results):
        if i == best:
            continue
        if result.usable:
            text += f" `{result.name}` {_repairs(result)}."
        else:
            reason = result.solution.reason or "it repairs no target within the gate."
            text += f" `{result.name}` has no result: {reason}"
    return text


def _repairs(result: RungResult) -> str:
    proposal, counts = result.solution.proposal, result.solution.held_out
    n = 0 if proposal is None else proposal.repaired
    text = f"repairs {plural(n, 'target')}"
    if counts is None:
        return text
    return (
        f"{text}; of the held-out samples it repairs "
        f"{counts.repaired:,} of {counts.n - counts.passed:,} failed "
        f"and breaks {counts.broken:,} of {counts.passed:,} passed ones"
    )


# Counts of all known samples, and of the held-out samples or None.
Counted = tuple[TargetCounts, TargetCounts | None]


def _counted(problem: Problem, solutions: Iterable[Solution]) -> Iterator[Counted]:
    for solution in solutions:
        for proposal in (solution.proposal, *solution.alternatives):
            if proposal is not None:
                yield problem.target_counts(proposal.after), solution.held_out
        for counts in solution.tried:
            yield counts, solution.held_out


def price_points(counted: Iterable[Counted]) -> tuple[PricePoint, ...]:
    """Returns the counts with most repairs in which at most a share breaks.

    There is a point for each share in `PRICE_LEVELS`.
    """

    def rank(pair: Counted) -> tuple[int, int, int]:
        counts, _ = pair
        return counts.repaired_in_target, -counts.broken, counts.repaired

    ranked = sorted(counted, key=rank, reverse=True)
    points = []
    for level in PRICE_LEVELS:
        for counts, held_out in ranked:
            if counts.broken <= level * counts.passed:
                points.append(
                    PricePoint(
                        level,
                        counts.broken,
                        counts.repaired_in_target,
                        counts.repaired,
                        held_out,
                    )
                )
                break
    return tuple(points)


def _is_one_layer(problem: Problem) -> bool:
    if len(problem.space.sites) != 1:
        return False
    site = problem.space.sites[0]
    prefix = f"{site.name}." if site.name else ""
    names = {f"{prefix}{name}" for name, _ in site.module.named_parameters(recurse=False)}
    return set(problem.scope) <= names


def _solve(problem: Problem, method: Method) -> Solution:
    name = type(method).__name__.lower()
    work = partial(_safely, problem, partial(method, problem), name=name)
    return problem.work.once(name, work, Solution)


def _safely(
    problem: Problem,
    search: Callable[[], Solution],
    base: Proposal | None = None,
    name: str = "swarm",
) -> Solution:
    """Runs a search or method. If it finds no weights or lacks memory, returns only a reason."""
    try:
        return search()
    except (EmptyLocalizationError, ReplayError) as error:
        reason = error.problem.rstrip(".")
    except (RuntimeError, MemoryError) as error:
        # One of several ranks must not go on alone: the others would wait for it forever.
        if problem.collective.world_size > 1 or not is_out_of_memory(error):
            raise
        reason = "out of memory"
    step = Step(name, 0, 0, 0.0, f"not run: {reason}")
    if base is not None:
        step = replace(step, repaired=base.repaired, broken=base.broken)
    return Solution(None, f"{reason}.", (step,))
