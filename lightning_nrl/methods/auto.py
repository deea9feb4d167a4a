"""`Auto`, the default method: climbs from one repair to the next, each from where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import lightning_nrl.methods.budget as budget
from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.formatting import plural
from lightning_nrl._utils.state import changed, current_state, parked
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.errors import ConfigurationError, EmptyLocalizationError, ReplayError, check_kind
from lightning_nrl.evaluation.sample_results import NO_COUNTS, TargetCounts
from lightning_nrl.evaluation.stats import net_repairs_in_standard_errors
from lightning_nrl.methods.convex import Convex
from lightning_nrl.methods.finetune_polish import (
    FineTunePolish,
    check_caution,
    fine_tune_and_polish,
    least_seconds,
)
from lightning_nrl.methods.held_out import draw_held_out_rows, estimate, is_ahead
from lightning_nrl.methods.local_search import LocalSearch, constrained_search
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.polish_weights import Polish
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.methods.solvers.polish import polish, polished
from lightning_nrl.records.repair_record import WeightChange
from lightning_nrl.records.steps import CautionPoint, PricePoint, Rung, Step
from lightning_nrl.search import SEARCHERS, ParticleSwarm, Searcher

FEWEST_FLIPS = 10  # of held-out samples; fewer do not show that targets have wrong labels
PATIENCE_OF_PRICES = 3  # `Convex.patience` in the rung `exact`
WITHOUT_MARGINS = (
    "Only a search ran, since the other rungs need a task with margins. For more repairs, give it "
    "some: `Custom(passed=..., loss=..., margin=f)`."
)
TOLERANCE = 0.01  # is proposed if it allows at least twice the repairs
# For `Solution.price`, shares of passed samples that may break.
PRICE_LEVELS = (0.0, 0.001, 0.005, 0.01, 0.02, 1.0)


@dataclass(frozen=True)
class Auto(Method):
    """Climbs: each rung starts where the last one ended, and is kept if held-out samples agree.

    All rungs aim to break no known passed sample.

    - `search` always runs. It localises the weights of the chosen layer that matter for the
      failures. A swarm then searches new values for these weights, starting from the original
      values.
    - `training` runs if more than one layer may change. It continues the training from the
      original weights, then polishes (`FineTunePolish`).
    - `exact` runs if the whole network or only one layer may change. It repairs the chosen layer
      with `Convex`. If only one layer may change and `Convex` does not suit it, `FineTunePolish`
      is used.
    - If `max_time` is too short for `EPOCHS_BEFORE_EXACT` of training, `exact` comes before it.
    - `push` takes small steps from there until the targets that are left are right (`Polish`).
    - `polish` replaces all rungs but `search` in an update, where a new model replaces an old one.
      Small steps from the new model restore all samples that the old model got right (`Polish`).

    If the task has no margins, only a `LocalSearch` runs.

    A rung is kept if it repairs a target, the gate allows what it breaks, and:

    - `training` is better than `search` (`held_out.is_ahead`),
    - `exact` and `push` repair more than the rung below (or as much, and break less), and of the
      samples that they do not use they break no more than they repair. `push` then goes on with
      these samples. They do not run if `training` repairs no more held-out samples than chance
      may, because wrong labels would be learned by heart.

    Attributes:
        swarm: the searcher of the rung `search`. It may be a swarm or any other searcher. None
            means a `ParticleSwarm` with 60 iterations.
        caution: as in `FineTunePolish`, from 0, which repairs most, to below 1. More breaks fewer
            unseen samples. None: 0, unless held-out samples gain more with another value.

    Raises:
        ConfigurationError: on construction, if `swarm` is no searcher or `caution` is no share.
    """

    trains: ClassVar[bool] = True
    swarm: Searcher | None = None
    caution: float | None = None

    def __post_init__(self) -> None:
        if self.swarm is None:
            # Not the default of the field, which a YAML parser would read as a dict.
            object.__setattr__(self, "swarm", ParticleSwarm(iterations=60))
        fits = isinstance(self.swarm, Searcher)
        check_kind("Auto.swarm", self.swarm, fits, "searcher", "Auto(ParticleSwarm(particles=50))")
        check_caution("Auto.caution", self.caution)

    def __call__(self, problem: Problem) -> Solution:
        """Climbs.

        Raises an `EmptyLocalizationError` if only a `LocalSearch` runs and finds no weights.
        """
        searcher = SEARCHERS.parse("Auto.swarm", self.swarm)
        if not problem.before.has_margins:
            solution = _without_raw_errors(problem, "search", LocalSearch(searcher))
            assert solution is not None
            return replace(solution, choice=WITHOUT_MARGINS)
        climb = _Climb(problem, searcher, self.caution)
        climb.run()
        solutions = [result.solution for result in climb.results]
        search = solutions[0]
        prices = price_points(_counted(climb.results))
        reason, choice = "", " ".join(result.verdict for result in climb.results)
        if not climb.best:
            reason, choice = _why_none(climb.results), ""
        offer = _what_a_tolerance_gives(prices, climb.best)
        return Solution(
            climb.best,
            f"{reason} {offer}".strip() if reason else "",
            tuple(step for solution in solutions for step in solution.steps),
            localization=search.localization,
            search=search.search,
            held_out=climb.held_out,
            rungs=tuple(result.record() for result in climb.results),
            choice=f"{choice} {offer}".strip() if choice else "",
            price=prices,
            caution=climb.caution_points,
        )


@dataclass(frozen=True)
class RungResult:
    """The result of one rung, and whether it is part of the repair."""

    name: str
    solution: Solution
    seconds: float
    is_kept: bool = False
    counts: TargetCounts = NO_COUNTS
    weights_changed: int = 0

    @property
    def usable(self) -> Proposal | None:
        """The proposal if it repairs a target and the gate allows what it breaks, else None."""
        proposal = self.solution.proposal
        if proposal is None or not proposal.repaired or proposal.excess:
            return None
        return proposal

    @property
    def verdict(self) -> str:
        """A sentence: whether the rung is kept, and what it repairs or why it repairs nothing."""
        if not self.usable or self.solution.reason:
            reason = self.solution.reason or "it repairs no target within the gate."
            proposal = self.solution.proposal
            if proposal is not None and proposal.excess:
                reason = f"it would break {plural(proposal.broken, 'known sample')}."
            return f"`{self.name}` is not kept: {reason}"
        verb = "is kept" if self.is_kept else "is not kept"
        return f"`{self.name}` {verb}: it {_repairs(self)}."

    def record(self) -> Rung:
        solution = self.solution
        return Rung(
            self.name,
            repaired_in_target=self.counts.repaired_in_target,
            repaired=self.counts.repaired,
            broken=self.counts.broken,
            weights_changed=self.weights_changed,
            seconds=round(self.seconds, 3),
            held_out=solution.held_out,
            kept=self.is_kept,
            note=solution.steps[-1].note if solution.steps else solution.reason,
            n_choices=solution.n_choices,
        )

    def counted(self, problem: Problem) -> RungResult:
        """Replaces the weights of a training, exact solution or push, and their results, by counts.

        A search, which may be restored later, keeps its few weights.
        """
        solution, proposal = self.solution, self.solution.proposal
        if proposal is None:
            return self
        if self.name != "search":
            solution = replace(solution, proposal=replace(proposal, state={}, after=problem.before))
        # As `WeightChange` counts them for the repair.
        old, new = current_state(problem.model), changed(problem.model, proposal.state)
        return replace(
            self,
            solution=solution,
            counts=problem.target_counts(proposal.after),
            weights_changed=WeightChange.between({name: old[name] for name in new}, new).changed,
        )


class _Climb:
    """Runs the rungs of `Auto`. `best` is where the climb stands; None: at the original weights.

    Under `max_time` the search gets a part of the time.
    """

    def __init__(self, problem: Problem, searcher: Searcher, caution: float | None) -> None:
        self._is_one_layer = _is_one_layer(problem)
        if not (self._is_one_layer or problem.update):
            # A training on all samples repairs more than a longer search.
            problem = replace(problem, n_scored=min(problem.n_scored, budget.FEWEST_SAMPLES))
        self.problem = problem
        self.searcher = searcher
        self.caution = caution
        self.results: list[RungResult] = []
        self.best: Proposal | None = None
        self.held_out: TargetCounts | None = None
        self._held_out_rows = None if problem.update else draw_held_out_rows(problem)
        # In so little time a solver repairs more than the training.
        few = least_seconds(problem, budget.FEW_EPOCHS)
        trains = not (self._is_one_layer or problem.update)
        self._is_hurried = trains and not problem.deadline_of_method().leaves(few)

    @property
    def caution_points(self) -> tuple[CautionPoint, ...]:
        """The held-out counts of a training that is kept, by caution."""
        for result in self.results:
            if result.is_kept and result.solution.caution:
                return result.solution.caution
        return ()

    def run(self) -> None:
        """Runs all rungs. If none is kept, searches once more, on all known samples."""
        self._climb("search", self._search)
        if self.problem.update:
            self._climb("polish", Polish(share=budget.UPDATE_TIME_SHARE))
        else:
            rungs: list[tuple[str, Callable[[Problem], Solution | None]]] = []
            if not self._is_one_layer:
                rungs.append(("training", self._training))
            if self.problem.whole_network or self._is_one_layer:
                rungs.append(("exact", self._exact))
            seconds = least_seconds(self.problem, budget.EPOCHS_BEFORE_EXACT)
            if not self.problem.deadline_of_method().leaves(seconds):
                rungs.reverse()
            for name, solve in (*rungs, ("push", self._push)):
                self._climb(name, solve)
        if self.best is None:
            first = self.results.pop(0).solution
            self._climb("search", partial(self._search_again, first))
            self.results.insert(0, self.results.pop())

    def _climb(self, name: str, solve: Callable[[Problem], Solution | None]) -> None:
        """Runs a rung, if there is something left to do, and keeps its result if it is better."""
        result = self.problem.work.once(name, partial(self._timed, name, solve), RungResult)
        if result is None:
            return
        is_kept = result.usable is not None and self._is_better(result)
        if is_kept:
            self.best = result.solution.proposal
            if self.held_out is None or name in ("search", "training") or self._is_hurried:
                self.held_out = result.solution.held_out
            if name == "training":
                # It starts at the original weights, so nothing is left of a search before it.
                self.results = [replace(earlier, is_kept=False) for earlier in self.results]
        self.results.append(replace(result, is_kept=is_kept).counted(self.problem))

    def _timed(self, name: str, solve: Callable[[Problem], Solution | None]) -> RungResult | None:
        began = self.problem.clock.elapsed
        solution = _without_raw_errors(self.problem, name, solve)
        if solution is None:
            return None
        return RungResult(name, solution, self.problem.clock.elapsed - began)

    def _is_better(self, result: RungResult) -> bool:
        proposal, counts = result.solution.proposal, result.solution.held_out
        assert proposal is not None
        if result.solution.reason:
            return False
        if self.best is None:
            harms = counts is not None and counts.broken > counts.repaired
            return result.name == "training" or not harms
        if result.name == "training":
            return is_ahead(proposal.value, counts, self.best.value, self.held_out)
        return proposal.rank > self.best.rank

    @property
    def _is_doubtful(self) -> bool:
        """True if many held-out samples flip in a training that is kept, but hardly for good."""
        for result in self.results:
            counts = result.solution.held_out
            if result.name == "training" and result.is_kept and counts is not None:
                has_many_flips = counts.repaired + counts.broken >= FEWEST_FLIPS
                return has_many_flips and net_repairs_in_standard_errors(counts) <= 1
        return False

    def _search(self, problem: Problem) -> Solution:
        """Searches from the original weights, without the held-out samples."""
        end = problem.deadline_of_method()
        if end.is_set:
            end = end.within(self._time_share_of_search(end) * end.agreed_seconds_left())
        if self._held_out_rows is None:
            return self._search_until(problem, end)
        solution = self._search_until(problem.without(self._held_out_rows), end)
        proposal = solution.proposal
        if proposal is None or solution.reason:
            return solution
        held_out = estimate(problem.before, proposal.after, self._held_out_rows)
        proposal = problem.counted(proposal.name, proposal.state, proposal.after)
        return replace(solution, proposal=proposal, held_out=held_out)

    def _search_again(self, first: Solution, problem: Problem) -> Solution:
        """Searches with all known samples; if that fails, restores what the first search broke."""
        solution = self._search_until(problem, problem.deadline_of_method())
        has_repairs = solution.proposal is not None and solution.proposal.repaired
        if has_repairs or first.proposal is None or not first.proposal.excess:
            return solution
        return replace(first, proposal=self._restored(first.proposal), held_out=None)

    def _restored(self, proposal: Proposal) -> Proposal:
        """Moves the weights that a search changed until no held-out sample is broken."""
        problem = self.problem
        old = current_state(problem.model)
        masks = {name: proposal.state.get(name, old[name]) != old[name] for name in problem.scope}
        deadline = problem.deadline_of_method()
        with problem.clock.stage("polish"):
            result = polish(
                problem, proposal.state, deadline=deadline, masks=masks, after=proposal.after
            )
        return problem.counted(proposal.name, result.state, result.after)

    def _search_until(self, problem: Problem, end: Deadline) -> Solution:
        return _safely(problem, partial(constrained_search, problem, self.searcher, end))

    def _time_share_of_search(self, end: Deadline) -> float:
        problem = self.problem
        if problem.update or self._is_one_layer or not end.leaves(least_seconds(problem)):
            return budget.LONE_SEARCH_TIME_SHARE
        return budget.HURRIED_SEARCH_TIME_SHARE if self._is_hurried else budget.SEARCH_TIME_SHARE

    def _training(self, problem: Problem) -> Solution:
        share = 1.0 if self._is_hurried else budget.TRAINING_TIME_SHARE
        return fine_tune_and_polish(problem, self._held_out_rows, share, self.caution)

    def _exact(self, problem: Problem) -> Solution | None:
        """Repairs the chosen layer. Returns None if `Convex` does not suit it under `auto`."""
        seconds = budget.EXACT_TIME_SHARE * problem.deadline_of_method().agreed_seconds_left()
        try:
            convex = Convex(PATIENCE_OF_PRICES, seconds, budget.MAX_PAIRS)
            return self._extend("convex", convex, holds_out=True)
        except ConfigurationError:
            if not self._is_one_layer:
                return None
            return self._extend("finetune-polish", FineTunePolish())

    def _push(self, problem: Problem) -> Solution | None:
        return self._extend("push", self._push_from)

    def _push_from(self, problem: Problem, start: Proposal | None = None) -> Solution:
        """Pushes all targets that fail, from the weights in the model or from `start`."""
        first = start or problem.original("original")
        deadline = problem.deadline_of_method(budget.PUSH_TIME_SHARE)
        has_time = deadline.leaves(budget.RESERVED_PASSES * problem.clock.one_pass)
        if start is None and not has_time:
            return Solution(None, "no time was left for small steps.")
        visits = budget.PUSH_SHARE * problem.visits
        proposal, step, _ = polished(problem, first, deadline=deadline, enforce=True, visits=visits)
        return Solution(proposal if proposal.repaired else None, steps=(step,))

    def _extend(
        self, name: str, solve: Callable[[Problem], Solution], *, holds_out: bool = False
    ) -> Solution | None:
        """Repairs what is left from where the climb stands; returns None if nothing is left.

        `holds_out` is True if `solve` holds samples out itself.
        """
        problem = self.problem
        if self._is_doubtful:
            return Solution(
                None,
                "the training hardly repairs more held-out samples than it breaks, so what is left "
                "to repair may have wrong labels.",
            )
        base = self.best or problem.original("original")
        with problem.starting_at(base) as left:
            if not left.before.targeted.any():
                return None
            solution = self._solve_left(left, name, solve, holds_out=holds_out)
        proposal = solution.proposal
        if proposal is None:
            return solution
        new = problem.counted(proposal.name, {**base.state, **proposal.state}, proposal.after)
        return replace(solution, proposal=new, tried=())

    def _solve_left(
        self,
        left: Problem,
        name: str,
        solve: Callable[[Problem], Solution],
        *,
        holds_out: bool,
    ) -> Solution:
        """Solves without some samples; unless it harms these, small steps go on with them."""
        rows = None if holds_out else draw_held_out_rows(left)
        used = left if rows is None else left.without(rows)
        work = partial(_safely, used, partial(solve, used), name=name)
        solution = self.problem.work.once(name, work, Solution)
        if rows is not None and solution.proposal is not None:
            held_out = estimate(left.before, solution.proposal.after, rows)
            solution = replace(solution, held_out=held_out)
        counts = solution.held_out
        if counts is not None and counts.broken > counts.repaired:
            reason = (
                f"it breaks {counts.broken:,} of the samples that it does not use "
                f"and repairs {counts.repaired:,}."
            )
            return Solution(None, reason, solution.steps, held_out=counts)
        if rows is None or solution.proposal is None:
            return solution
        # Rarely read by now, and large.
        state = {name: parked(value) for name, value in solution.proposal.state.items()}
        solution = replace(solution, proposal=replace(solution.proposal, state=state))
        joined = self._push_from(left, solution.proposal)
        return replace(solution, proposal=joined.proposal, steps=(*solution.steps, *joined.steps))


def _why_none(results: Sequence[RungResult]) -> str:
    reasons = [result.solution.reason for result in results if result.solution.reason]
    sentences = dict.fromkeys(f"{reason[0].upper()}{reason[1:]}" for reason in reasons)
    return " ".join(sentences) or "no rung repairs a target within the gate."


def _repairs(result: RungResult) -> str:
    counts = result.solution.held_out
    text = f"repairs {plural(result.counts.repaired_in_target, 'target')}"
    if counts is None:
        return text
    return (
        f"{text}; of the held-out samples it repairs "
        f"{counts.repaired:,} of {counts.n - counts.passed:,} failed "
        f"and breaks {counts.broken:,} of {counts.passed:,} passed ones"
    )


# Counts of all known samples, and of the held-out samples or None.
Counted = tuple[TargetCounts, TargetCounts | None]


def _counted(results: Iterable[RungResult]) -> Iterator[Counted]:
    for result in results:
        solution = result.solution
        # The held-out counts of the other rungs are from where these start.
        held_out = solution.held_out if result.name in ("search", "training") else None
        for counts in (result.counts, *solution.tried):
            if counts.n:
                yield counts, held_out


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


def _what_a_tolerance_gives(points: Sequence[PricePoint], best: Proposal | None) -> str:
    """Returns a sentence if the gate alone forbids many repairs, and held-out samples gain."""
    repaired = best.repaired if best else 0
    for point in points:
        gains = point.held_out is not None and point.held_out.repaired > point.held_out.broken
        if point.allowed == TOLERANCE and gains and point.repaired_in_target >= 2 * repaired + 1:
            return (
                f'With `gate="tolerance:{TOLERANCE:.0%}"`, '
                f"{plural(point.repaired_in_target, 'target')} would be repaired and "
                f"{plural(point.broken, 'known sample')} broken."
            )
    return ""


def _is_one_layer(problem: Problem) -> bool:
    if len(problem.space.sites) != 1:
        return False
    site = problem.space.sites[0]
    prefix = f"{site.name}." if site.name else ""
    names = {f"{prefix}{name}" for name, _ in site.module.named_parameters(recurse=False)}
    return set(problem.scope) <= names


def _without_raw_errors(
    problem: Problem, name: str, solve: Callable[[Problem], Solution | None]
) -> Solution | None:
    """Runs a rung; if it raises an error, returns only the reason."""
    try:
        return solve(problem)
    except Exception as error:
        reason = problem.go_on_after(error, name)
    return Solution(None, f"{reason}.", (Step(name, 0, 0, 0.0, f"stopped: {reason}"),))


def _safely(problem: Problem, search: Callable[[], Solution], name: str = "swarm") -> Solution:
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
    return Solution(None, f"{reason}.", (Step(name, 0, 0, 0.0, f"not run: {reason}"),))
