"""Localise, then search by particle swarm: the method of the paper (section II)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_nrl.batches import Batch
from lightning_nrl.localization import Localization
from lightning_nrl.methods.problem import Problem, Solution
from lightning_nrl.scoring import Recording, make_scorer, record
from lightning_nrl.search import ParticleSwarm, SearchHistory, SearchResult, Spread, search

__all__ = ["by_swarm", "half", "rows"]


def by_swarm(problem: Problem, settings: ParticleSwarm) -> Solution:
    """Localises weights of the chosen layers and searches new values for them.

    Raises:
        EmptyLocalizationError: no weight matters for the failed data without mattering for the passed.
    """
    space, clock = problem.space, problem.clock
    with clock.stage("localize"):
        keep = problem.before.targeted | problem.before.passed
        recording = record(
            problem.model,
            rows(problem),
            space,
            problem.task,
            keep,
            context=problem.context,
            budget=half(problem.budget),
        )
        localization = problem.localizer(
            recording,
            problem.task,
            failed=problem.before.targeted,
            passed=problem.before.passed,
            collective=problem.collective,
        )
    with clock.stage("search"):
        result = _search(problem, settings, recording, localization)
    values = problem.collective.agreed(result.values)
    if torch.equal(values, space.flat()[localization.weights.to(space.device)]):
        reason = "the search found nothing better than the original weights."
        return Solution(None, reason, localization=localization, result=result)
    with clock.stage("judge"):
        proposal = problem.propose("swarm", space.changed(localization.weights, values))
    step = proposal.step(result.seconds, f"{len(values):,} weights, {result.iterations:,} iterations")
    return Solution(proposal, steps=(step,), localization=localization, result=result)


@torch.no_grad()
def _search(
    problem: Problem, settings: ParticleSwarm, recording: Recording, localization: Localization
) -> SearchResult:
    space, before = recording.space, problem.before
    where = localization.weights.to(space.device)
    passed_loss = getattr(problem.fitness, "uses_passed_loss", True)
    scorer = make_scorer(
        recording,
        where,
        before.targeted,
        problem.passed,
        problem.task,
        collective=problem.collective,
        budget=half(problem.budget),
        passed_loss=passed_loss,
        fragility=before.loss,
    )
    result = search(
        scorer,
        space.flat()[where],
        spread=Spread.around(space, where),
        fitness=problem.fitness,
        settings=settings,
        seed=problem.seed,
        on_progress=partial(_tell, problem, settings.iterations, int(problem.passed.sum())),
    )
    if passed_loss:
        return result
    unknown = torch.full_like(result.history.loss_passed, torch.nan)
    return replace(result, history=replace(result.history, loss_passed=unknown))


def rows(problem: Problem) -> Iterator[tuple[Batch, Tensor]]:
    """This rank's known data, each batch with the rows of its samples in the evidence."""
    for source in problem.known:
        for batch in source:
            yield batch, problem.before.rows(source.split, batch.position)


def half(budget: int | None) -> int | None:
    """Recording and scoring share what the search may use."""
    return None if budget is None else max(1, budget // 2)


def _tell(problem: Problem, total: int, n_passed: int, done: int, history: SearchHistory) -> None:
    problem.clock.tell(done, total, int(history.patched[-1]), n_passed - int(history.intact[-1]))
