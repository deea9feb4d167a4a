"""Localises weights, then searches new values for them (paper, section II), with any searcher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_nrl._utils.registry import Registry
from lightning_nrl._utils.state import State
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.evaluator import Need
from lightning_nrl.evaluation.sample_results import Flips
from lightning_nrl.localization import LOCALIZERS, KnownData, Localization, Localizer
from lightning_nrl.methods.method import Method
from lightning_nrl.methods.problem import Problem
from lightning_nrl.methods.search_samples import (
    choose_samples,
    n_to_score,
    preparation_seconds,
    progress,
    record_known,
    scorer_for,
)
from lightning_nrl.methods.solution import Proposal, Solution, better
from lightning_nrl.records.steps import CUT, Step
from lightning_nrl.search import FITNESSES, SEARCHERS, Searcher, SearchResult, WeightStats, search
from lightning_nrl.search.fitness import FitnessFunction
from lightning_nrl.search.loop import TIME_WAS_OVER

KEPT_MARGIN_SHARE = 0.5  # share of its margin that a sample has to keep
# Share of the median margin of passed samples that suffices. A polish reaches it.
SUFFICIENT_MARGIN = 0.04


@dataclass(frozen=True)
class LocalSearchResult:
    """The result of `localize_and_search`."""

    localization: Localization
    search: SearchResult  # the best values found, and the log of the search
    state: State | None  # whole tensors with the best values; None if the original values are best
    notes: tuple[str, ...]  # how the recording is stored, and how many samples are used

    def solved_by(self, proposal: Proposal) -> Solution:
        search = self.search
        was_cut = search.stopped == TIME_WAS_OVER
        size = f"{len(search.values):,} weights, {search.iterations:,} iterations"
        note = "; ".join(filter(None, [size, CUT if was_cut else "", *self.notes]))
        step = proposal.step(search.seconds, note, was_cut=was_cut)
        return Solution(proposal, "", (step,), localization=self.localization, search=search)


def parse_parts(method: Method, prefix: str, /, **registries: Registry[Any]) -> None:
    """Replaces parts of a method that are given by name, by keyword the registry of each.

    An argument is named with `prefix` in messages. A part that is None stays.
    """
    for name, registry in registries.items():
        part = vars(method)[name]
        if part is not None:
            object.__setattr__(method, name, registry.parse(prefix + name, part))


@dataclass(frozen=True)
class LocalSearch(Method):
    """Localises weights, then searches new values for them (paper, section II).

    Attributes:
        searcher: the search algorithm, by name or as an object.
        seconds: time limit of the search in seconds.
        localizer: chooses the weights to search, by name or as an object. None means
            `SearchOptions.localizer`.
        fitness: compares the new values, by name or as an object. None means
            `SearchOptions.fitness`.

    Raises:
        ConfigurationError: on construction, for an unknown name or an unsuitable object.

    Example:
        >>> LocalSearch("swarm", fitness="arachne-de").fitness
        ArachneDEFitness(aggressiveness=10.0)
    """

    needs: ClassVar[tuple[Need, ...]] = ("recording",)
    searcher: str | Searcher = "swarm"
    seconds: float = math.inf
    localizer: str | Localizer | None = None
    fitness: str | FitnessFunction | None = None

    def __post_init__(self) -> None:
        parse_parts(self, "", searcher=SEARCHERS, localizer=LOCALIZERS, fitness=FITNESSES)

    def with_parts(
        self,
        *,
        localizer: str | Localizer | None = None,
        fitness: str | FitnessFunction | None = None,
        searcher: str | Searcher | None = None,
    ) -> LocalSearch:
        """Returns a copy with other parts. A part that is None stays as it is."""
        return replace(
            self,
            localizer=localizer or self.localizer,
            fitness=fitness or self.fitness,
            searcher=searcher or self.searcher,
        )

    def __call__(self, problem: Problem) -> Solution:
        """Localises and searches; raises an `EmptyLocalizationError` if no weights are found."""
        searcher = SEARCHERS.parse("searcher", self.searcher)
        problem = replace(
            problem,
            localizer=LOCALIZERS.parse("localizer", self.localizer or problem.localizer),
            fitness=FITNESSES.parse("fitness", self.fitness or problem.fitness),
        )
        clock = problem.clock
        end = problem.deadline_of_method()
        if not end.leaves(preparation_seconds(problem)):
            return Solution(
                None,
                f"no time was left for a search after {clock.elapsed:.1f} s; raise `max_time`.",
            )
        end = end.within(self.seconds)
        best = localize_and_search(problem, searcher, end, problem.rounding_reserve)
        if best.state is None:
            reason = "the search found nothing better than the original weights."
            return Solution(None, reason, localization=best.localization, search=best.search)
        with clock.stage("judge"):
            return best.solved_by(problem.propose(searcher.label, best.state))


def constrained_search(problem: Problem, searcher: Searcher, end: Deadline) -> Solution:
    """Localises weights, then searches new values that keep all known passed samples.

    A passed sample must keep half of its margin, or the share `SUFFICIENT_MARGIN` of the median
    margin if that is less, since unseen samples break where known samples nearly break.
    """
    if not end.leaves(preparation_seconds(problem)):
        step = Step("swarm", 0, 0, 0.0, f"not run: {CUT}", was_cut=True)
        return Solution(None, "no time was left for a search.", (step,))
    original = problem.original("swarm")
    problem = problem.steered(original.after)
    before = problem.before
    # The gate limits the passed samples that break.
    counts = Flips.between(before, original.after).counts(problem.used)
    fitness = problem.fitness.as_constraint(float(problem.gate.allowed(counts)))
    sufficient = max(SUFFICIENT_MARGIN * before.margin_unit, problem.rounding)
    kept = (KEPT_MARGIN_SHARE * before.margin).nan_to_num(0.0).clamp(0, sufficient)
    problem = replace(problem, passed=before.passed, fitness=fitness)
    search = localize_and_search(problem, searcher, end, kept.where(before.passed, 0.0))
    final = original
    if search.state is not None:
        with problem.clock.stage("judge"):
            final = better([original, problem.propose("swarm", search.state)]) or original
    return search.solved_by(final)


def localize_and_search(
    problem: Problem, searcher: Searcher, end: Deadline, reserve: Tensor | None
) -> LocalSearchResult:
    """Localises weights, then searches new values that repair targets and break no `passed` sample.

    To count as passing, a sample needs the margin in `reserve`, `N`; None: no minimum. Raises an
    `EmptyLocalizationError` if no weights are found.
    """
    work = partial(_localize_and_search, problem, searcher, end, reserve)
    return problem.work.once("search", work, LocalSearchResult)


def _localize_and_search(
    problem: Problem, searcher: Searcher, end: Deadline, reserve: Tensor | None
) -> LocalSearchResult:
    space = problem.space
    clock = problem.clock
    before = problem.before
    choice = choose_samples(before, problem.passed, n_to_score(problem, end), problem.seed)
    failed = before.targeted & choice.recorded
    kept = problem.passed & choice.recorded
    with clock.stage("localize"):
        recording = record_known(problem, choice.recorded)
        localizer = problem.localizer.on(KnownData(problem.evaluator, problem.known, before, space))
        localization = localizer(
            recording,
            problem.evaluator,
            failed=failed,
            passed=problem.passed & choice.representative,
        )
    where = localization.weights.to(space.device)
    n_passed = int(kept.sum())
    with clock.stage("search"), torch.no_grad():
        scorer = scorer_for(problem, recording, where, failed, kept, problem.fitness, reserve)
        result = search(
            scorer,
            space.flat()[where],
            stats=WeightStats.around(space, where),
            fitness=problem.fitness,
            searcher=searcher,
            seed=problem.seed,
            deadline=end,
            on_progress=progress(problem, searcher, n_passed),
        )
    if not problem.fitness.uses_passed_loss:
        unknown = torch.full_like(result.history.loss_passed, torch.nan)
        result = replace(result, history=replace(result.history, loss_passed=unknown))
    values = problem.collective.agreed(result.values)
    state = None if torch.equal(values, space.flat()[where]) else space.changed(where, values)
    return LocalSearchResult(localization, result, state, (recording.storage, choice.note))
