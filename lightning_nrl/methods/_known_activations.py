"""Recording what the model computes on known data, once for all candidates of a problem."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from lightning_nrl._scoring import ActivationCache, record
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation.head_features import drawn
from lightning_nrl.problem import Problem

__all__ = ["half_budget", "record_known"]


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


def half_budget(problem: Problem) -> int | None:
    """Bytes for the recorded activations, and as many for scoring: they share what the search may use."""
    return None if problem.budget is None else max(1, problem.budget // 2)
