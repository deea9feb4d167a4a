"""Which known samples a search looks at, what is recorded of them, and the scorer of its candidates.

Of very many samples only a bounded number, so that time and memory are bounded too; what comes of it is counted on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._utils.timing import Deadline
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation.head_features import row_batches
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.methods.budget import FEWEST_SAMPLES, PREPARATION_PASSES, PREPARATION_SECONDS, PREPARATION_TIME_SHARE
from lightning_nrl.methods.problem import Problem
from lightning_nrl.search import Searcher, SearchHistory
from lightning_nrl.search._scoring.activation_cache import ActivationCache
from lightning_nrl.search._scoring.recording import record
from lightning_nrl.search._scoring.scorer import make_scorer
from lightning_nrl.search.fitness import FitnessFunction, needs_credit, needs_passed_loss
from lightning_nrl.search.scores import Scorer

MOST_REPRESENTATIVE = 20_000  # drawn samples are enough for a mean over passed data
FAILED_SHARE = 0.5  # of the samples of a search, at most
FEW_SHARE = 0.25  # with no larger part of very many samples to be recorded, only these are read


@dataclass(frozen=True)
class SampleChoice:
    """The known samples that a search looks at, `N` bool each by row of the results."""

    recorded: Tensor  # all of them
    representative: Tensor  # the passed ones that were drawn whatever their margin, for means over passed data
    note: str = ""  # how many of how many, in words; empty if none is left out


def n_to_score(problem: Problem, deadline: Deadline) -> int:
    """Samples that a search may look at, on every rank: fewer than the problem says only where time is short."""
    most = problem.n_scored
    if not math.isfinite(deadline.end) or min(most, len(problem.before)) <= FEWEST_SAMPLES:
        return most
    seconds = PREPARATION_TIME_SHARE * max(0.0, deadline.seconds_left)
    n = min(most, int(seconds / preparation_seconds(problem, 1)))
    return int(problem.collective.agreed(torch.tensor(max(FEWEST_SAMPLES, n))))


def preparation_seconds(problem: Problem, n: int = FEWEST_SAMPLES) -> float:
    """About how long it takes to prepare a search that looks at `n` known samples, or at all."""
    size = len(problem.before)
    return min(n, size) * (PREPARATION_PASSES * problem.clock.one_pass / max(1, size) + PREPARATION_SECONDS)


def choose_samples(before: SampleResults, failed: Tensor, passed: Tensor, most: int, seed: int) -> SampleChoice:
    """The samples of a search, `most` of them at most.

    With no more than that, all passed ones: not only those that are asked for, so that a batch's share of a sum is, bit
    for bit, what it is in a sweep. Else the failed ones, of too many those nearest to the border; half of the rest are
    passed ones nearest to the border, which candidates break first, and half are drawn from all others. `failed` are
    to pass, `passed` to be kept, `N` bool.
    """
    whole, wanted = failed | passed | before.passed, failed | passed
    if int(whole.sum()) <= most:
        return SampleChoice(whole, before.passed | passed)
    n_wanted = int(wanted.sum())
    if n_wanted <= most:
        return SampleChoice(wanted, passed)
    n_failed = int((failed & ~passed).sum())
    kept_failed = min(n_failed, max(most - int(passed.sum()), int(FAILED_SHARE * most)))
    chosen, near = torch.zeros_like(wanted), _distance(before)
    chosen[_nearest(near, failed & ~passed, kept_failed)] = True
    room = most - kept_failed
    chosen[_nearest(near, passed, room - room // 2)] = True
    others = (passed & ~chosen).nonzero().flatten()
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    recorded, representative = chosen, passed
    recorded[others[order[: room // 2]]] = True
    if bool((passed & ~recorded).any()):
        representative = torch.zeros_like(passed)
        representative[others[order[: min(room // 2, MOST_REPRESENTATIVE)]]] = True
    return SampleChoice(recorded, representative, f"searched on {int(recorded.sum()):,} of {n_wanted:,} samples")


def _distance(before: SampleResults) -> Tensor:
    """`N`, how near to the border each sample is, less for what weighs more; by its loss where there are no margins."""
    if bool(before.margin.isfinite().all()):
        return before.margin.abs() / before.weight.to(before.margin)
    weight = before.weight.to(before.loss)
    return torch.where(before.passed, -before.loss * weight, before.loss / weight)


def _nearest(distance: Tensor, rows: Tensor, n: int) -> Tensor:
    own = rows.nonzero().flatten()
    return own if len(own) <= n else own[distance[own].argsort(stable=True)[:n]]


def record_known(problem: Problem, keep: Tensor) -> ActivationCache:
    """The activations of the samples in `keep`, `N` bool by row of the results, under the weights as they are now.

    A layer that cannot be recorded is a `ReplayError` on every rank, if on one.
    """
    rows = problem.before.rows
    batches: Iterable[tuple[Batch, Tensor]] = (
        (batch, rows(source.split, batch.position)) for source in problem.known for batch in source
    )
    draw = partial(row_batches, problem.known, problem.before)
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
    """Scores new values of the weights at `where` on I_neg and I_pos; `reserve`, `N`, is the margin each must keep."""
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


def progress(problem: Problem, searcher: Searcher[Any], n_passed: int) -> Callable[[int, SearchHistory], None]:
    """Returns a function that tells the clock after each iteration what is repaired and broken."""

    def tell(done: int, history: SearchHistory) -> None:
        broken = n_passed - int(history.intact[-1])
        problem.clock.tell(done, searcher.iterations, int(history.patched[-1]), broken)

    return tell


def half_budget(problem: Problem) -> int | None:
    """Bytes for the recorded activations, and as many for scoring: they share what the search may use."""
    return None if problem.budget is None else max(1, problem.budget // 2)
