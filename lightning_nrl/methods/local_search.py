"""Localises weights, then searches new values for them (paper, section II), with any searcher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_nrl._utils.state import State
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.deployed_precision import rounding_reserve
from lightning_nrl.evaluation.evaluator import Need
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
from lightning_nrl.methods.solution import Proposal, Solution
from lightning_nrl.records.steps import CUT, Step
from lightning_nrl.search import FITNESSES, SEARCHERS, Searcher, SearchResult, WeightStats, search
from lightning_nrl.search.fitness import FitnessFunction, needs_passed_loss
from lightning_nrl.search.loop import TIME_WAS_OVER

Elites = Callable[[Tensor, int], Tensor]
"""Takes positions of K weights, int64, and a number; returns at most that many known good values
for them, `M x K`.
"""


@dataclass(frozen=True)
class SearchGoal:
    """The goal of a localisation and search; each tensor has one value per known sample (`N`)."""

    failed: Tensor  # N bool, samples for which the localised weights should matter
    passed: Tensor  # N bool, samples for which the localised weights should not matter
    constrained: Tensor  # N bool, samples that new weights should not break (I_pos)
    fitness: FitnessFunction
    reserve: Tensor | None  # N, margins that samples need to count as passing; None: no minimum
    deadline: Deadline
    scored: Tensor | None = (
        None  # N bool, samples that new weights should get right (I_neg); None means the targets
    )


@dataclass(frozen=True)
class LocalSearchResult:
    """The result of `localize_and_search`."""

    localization: Localization  # the weights that were searched
    search: SearchResult  # the best values found, and the log of the search
    state: State | None  # whole tensors with the best values; None if the original values are best
    n_passed: int  # number of passed samples that the search scored
    notes: tuple[str, ...]  # how the recording is stored, and how many samples are used

    @property
    def was_cut(self) -> bool:
        return self.search.stopped == TIME_WAS_OVER

    @property
    def note(self) -> str:
        size = f"{len(self.search.values):,} weights, {self.search.iterations:,} iterations"
        cut = CUT if self.was_cut else ""
        return "; ".join(part for part in (size, cut, *self.notes) if part)

    def solution(
        self, proposal: Proposal | None, reason: str = "", steps: Sequence[Step] = ()
    ) -> Solution:
        found, result = self.localization, self.search
        return Solution(
            proposal,
            reason,
            tuple(steps),
            localization=found,
            result=result,
            n_passed=self.n_passed,
        )


@dataclass(frozen=True)
class LocalSearch(Method):
    """Localises weights, then searches new values by scores on targets and passed samples (paper,
    section II).

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
        >>> LocalSearch("differential-evolution", localizer="arachne-v2", fitness="arachne-de").fitness
        ArachneDEFitness(aggressiveness=10.0)
    """

    needs: ClassVar[tuple[Need, ...]] = ("recording",)
    searcher: str | Searcher[Any] = "swarm"
    seconds: float = math.inf
    localizer: str | Localizer | None = None
    fitness: str | FitnessFunction | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "searcher", SEARCHERS.parse("searcher", self.searcher))
        for name, registry in (("localizer", LOCALIZERS), ("fitness", FITNESSES)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, registry.parse(name, getattr(self, name)))

    def with_parts(
        self,
        *,
        localizer: str | Localizer | None = None,
        fitness: str | FitnessFunction | None = None,
        searcher: str | Searcher[Any] | None = None,
    ) -> LocalSearch:
        """Returns a copy with other parts. A part that is None stays as it is."""
        return replace(
            self,
            localizer=self.localizer if localizer is None else localizer,
            fitness=self.fitness if fitness is None else fitness,
            searcher=self.searcher if searcher is None else searcher,
        )

    def __call__(self, problem: Problem) -> Solution:
        """Localises and searches; raises an `EmptyLocalizationError` if the localiser finds no
        weights.
        """
        searcher: Any = self.searcher
        own: dict[str, Any] = {"localizer": self.localizer, "fitness": self.fitness}
        problem = replace(problem, **{name: part for name, part in own.items() if part is not None})
        before, clock, end = problem.before, problem.clock, problem.deadline_of_method()
        if not end.leaves(preparation_seconds(problem)):
            return Solution(
                None,
                f"no time was left for a search after {clock.elapsed:.1f} s; raise `max_time`.",
            )
        reserve = rounding_reserve(problem.evaluator.precision, before)
        end = end.within(self.seconds)
        goal = SearchGoal(
            before.targeted, problem.passed, problem.passed, problem.fitness, reserve, end
        )
        found = localize_and_search(problem, searcher, goal)
        if found.state is None:
            return found.solution(
                None, "the search found nothing better than the original weights."
            )
        with clock.stage("judge"):
            proposal = problem.propose(getattr(searcher, "label", "swarm"), found.state)
        step = proposal.step(found.search.seconds, found.note, was_cut=found.was_cut)
        return found.solution(proposal, steps=(step,))


def localize_and_search(
    problem: Problem, searcher: Searcher[Any], goal: SearchGoal, elites: Elites | None = None
) -> LocalSearchResult:
    """Localises weights, then searches new values; raises an `EmptyLocalizationError` if no weights
    are found.
    """
    work = partial(_localized_and_searched, problem, searcher, goal, elites)
    return problem.work.once("search", work, LocalSearchResult)


def _localized_and_searched(
    problem: Problem, searcher: Searcher[Any], goal: SearchGoal, elites: Elites | None
) -> LocalSearchResult:
    space, clock, before = problem.space, problem.clock, problem.before
    scored = before.targeted if goal.scored is None else goal.scored
    most = n_to_score(problem, goal.deadline)
    choice = choose_samples(
        before, scored | goal.failed, goal.passed | goal.constrained, most, problem.seed
    )
    scored, kept = scored & choice.recorded, goal.constrained & choice.recorded
    failed, passed = goal.failed & choice.recorded, goal.passed & choice.representative
    with clock.stage("localize"):
        recording = record_known(problem, choice.recorded)
        known = KnownData(problem.evaluator, problem.known, before, space)
        localizer = problem.localizer.on(known)
        localization = localizer(recording, problem.evaluator, failed=failed, passed=passed)
    where, n_constrained = localization.weights.to(space.device), int(kept.sum())
    with clock.stage("search"), torch.no_grad():
        values = None if elites is None else elites(where, searcher.n_candidates // 2)
        how: dict[str, Any] = {"reserve": goal.reserve, "weighted": goal.scored is None}
        result = search(
            scorer_for(problem, recording, where, scored, kept, goal.fitness, **how),
            space.flat()[where],
            stats=WeightStats.around(space, where),
            fitness=goal.fitness,
            searcher=searcher,
            seed=problem.seed,
            elites=values,
            deadline=goal.deadline,
            on_progress=progress(problem, searcher, n_constrained),
        )
    if not needs_passed_loss(goal.fitness):
        unknown = torch.full_like(result.history.loss_passed, torch.nan)
        result = replace(result, history=replace(result.history, loss_passed=unknown))
    values = problem.collective.agreed(result.values)
    state = None if torch.equal(values, space.flat()[where]) else space.changed(where, values)
    return LocalSearchResult(
        localization, result, state, n_constrained, (recording.storage, choice.note)
    )
