"""Recording what the model computes on known data, once for all candidates of a problem."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from lightning_nrl._scoring import ActivationCache, make_scorer, record
from lightning_nrl._scoring.scores import Scorer
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation._head_features import drawn
from lightning_nrl.problem import Problem
from lightning_nrl.search.family_fitness import needs_credit
from lightning_nrl.search.fitness import FitnessFunction, needs_passed_loss

__all__ = ["record_known", "scorer_for"]


FEW_SHARE = 0.25
"""With no larger part of very many samples to be recorded, only these are read."""


def record_known(problem: Problem, keep: Tensor) -> ActivationCache:
    """The activations of the samples in `keep`, `N` bool by row of the results, under the weights as they are now.

    A layer that cannot be recorded is a `ReplayError` on every rank, if on one.
    """
    rows = problem.before.rows
    batches: Iterable[tuple[Batch, Tensor]] = (
        (batch, rows(source.split, batch.position)) for source in problem.known for batch in source
    )
    draw = partial(drawn, problem.known, problem.before)
    if len(keep) > problem.n_scored and int(keep.sum()) < FEW_SHARE * len(keep):
        batches = draw(keep.nonzero().flatten())
    work = partial(record, problem.evaluator, batches, problem.space, keep, budget=half_budget(problem), draw=draw)
    return problem.collective.all_or_none(work, "known data could not be recorded on another rank.")


def scorer_for(
    problem: Problem,
    recording: ActivationCache,
    where: Tensor,
    failed: Tensor,
    passed: Tensor,
    fitness: FitnessFunction,
    *,
    reserve: Tensor | None,
    weighted: bool = True,
) -> Scorer:
    """Scores new values of the weights at `where` by what the fitness reads of the scores.

    `failed` and `passed` are I_neg and I_pos; `reserve`, `N`, is the margin that each sample must keep.
    """
    before = problem.before
    return make_scorer(
        recording,
        where,
        failed,
        passed,
        problem.evaluator,
        budget=half_budget(problem),
        passed_loss=needs_passed_loss(fitness),
        fragility=before.loss,
        reserve=reserve,
        weight=before.finite_weight if before.weighted and weighted else None,
        credit=needs_credit(fitness),
    )


def half_budget(problem: Problem) -> int | None:
    """Bytes for the recorded activations, and as many for scoring: they share what the search may use."""
    return None if problem.budget is None else max(1, problem.budget // 2)
