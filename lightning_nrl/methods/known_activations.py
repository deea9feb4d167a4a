"""Recording what the model computes on known data, once for all candidates of a problem."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from lightning_nrl._scoring import ActivationCache, record
from lightning_nrl.data.batch import Batch
from lightning_nrl.problem import Problem

__all__ = ["half_budget", "record_known"]


def record_known(problem: Problem, keep: Tensor) -> ActivationCache:
    """The activations at the layers of the problem, under the weights that the model has now.

    Args:
        problem: says which data, layers and how much memory.
        keep: `N` bool by row of the evidence, the samples to record.

    Raises:
        ReplayError: on every rank, if on one: a layer is never called, or the rest of the network cannot be replayed.
    """
    work = partial(
        record,
        problem.evaluator,
        _batches(problem),
        problem.space,
        keep,
        budget=half_budget(problem),
    )
    return problem.collective.all_or_none(work, "known data could not be recorded on another rank.")


def half_budget(problem: Problem) -> int | None:
    """Bytes for the recorded activations, and as many for scoring: they share what the search may use."""
    return None if problem.budget is None else max(1, problem.budget // 2)


def _batches(problem: Problem) -> Iterator[tuple[Batch, Tensor]]:
    """This rank's known data, each batch with the rows of its samples in the evidence."""
    for source in problem.known:
        for batch in source:
            yield batch, problem.before.rows(source.split, batch.position)
