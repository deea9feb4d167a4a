"""Recording what the model computes on known data, once for all candidates of a problem."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from lightning_nrl._scoring import ActivationCache, record
from lightning_nrl.evaluation._head_features import drawn
from lightning_nrl.problem import Problem

__all__ = ["half_budget", "record_known"]


def record_known(problem: Problem, keep: Tensor) -> ActivationCache:
    """The activations of the samples in `keep`, `N` bool by row of the results, under the weights as they are now.

    A layer that cannot be recorded is a `ReplayError` on every rank, if on one.
    """
    rows = problem.before.rows
    batches = ((batch, rows(source.split, batch.position)) for source in problem.known for batch in source)
    draw = partial(drawn, problem.known, problem.before)
    work = partial(record, problem.evaluator, batches, problem.space, keep, budget=half_budget(problem), draw=draw)
    return problem.collective.all_or_none(work, "known data could not be recorded on another rank.")


def half_budget(problem: Problem) -> int | None:
    """Bytes for the recorded activations, and as many for scoring: they share what the search may use."""
    return None if problem.budget is None else max(1, problem.budget // 2)
