"""Chooses the known samples of a search, records their activations and builds the scorer.

The number of samples is limited, and so are time and memory. The result of the search is counted on
all known samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_nrl._utils.preserve import shuffled
from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.evaluation.head_features import all_batches, row_batches
from lightning_nrl.methods.budget import (
    FEWEST_SAMPLES,
    PREPARATION_PASSES,
    PREPARATION_SECONDS,
    PREPARATION_TIME_SHARE,
)
from lightning_nrl.methods.problem import Problem
from lightning_nrl.search import FitnessFunction, Searcher, SearchHistory
from lightning_nrl.search.scores import Scorer
from lightning_nrl.search.scoring.activation_cache import ActivationCache
from lightning_nrl.search.scoring.recording import record
from lightning_nrl.search.scoring.scorer import make_scorer

MOST_REPRESENTATIVE = 20_000  # randomly drawn samples; enough for a mean over passed data
# Maximum share of failed samples in a search. There are more only if passed samples leave room.
FAILED_SHARE = 0.5
# If less than this share of large data is recorded, only the chosen samples are read.
FEW_SHARE = 0.25


@dataclass(frozen=True)
class SampleChoice:
    """The known samples that a search uses, as masks `N` bool with one value per known sample."""

    recorded: Tensor  # all samples that the search uses
    # All passed ones in `recorded`, or some of them drawn at random; for means over passed data.
    representative: Tensor
    note: str = ""  # how many samples are used, for the report; empty if all are


def n_to_score(problem: Problem, deadline: Deadline) -> int:
    """Returns how many samples a search may use: `Problem.n_scored`, or fewer if time is short."""
    most = problem.n_scored
    if not math.isfinite(deadline.end) or min(most, len(problem.before)) <= FEWEST_SAMPLES:
        return most
    seconds = PREPARATION_TIME_SHARE * max(0.0, deadline.seconds_left)
    n = min(most, int(seconds / preparation_seconds(problem, 1)))
    return int(problem.collective.agreed(torch.tensor(max(FEWEST_SAMPLES, n))))


def preparation_seconds(problem: Problem, n: int = FEWEST_SAMPLES) -> float:
    """Estimates the seconds to prepare a search on `n` known samples, or all if there are fewer."""
    size = len(problem.before)
    if problem.record.cache is not None:
        return min(n, size) * PREPARATION_SECONDS
    return min(n, size) * (
        PREPARATION_PASSES * problem.clock.one_pass / max(1, size) + PREPARATION_SECONDS
    )


def choose_samples(before: SampleResults, passed: Tensor, most: int, seed: int) -> SampleChoice:
    """Chooses at most `most` samples: targets to repair, and samples to keep (`passed`, `N` bool).

    If there are more than `most`, at most half of the chosen samples (more if passed samples are
    few) are failed ones, nearest to the boundary. The rest are passed samples: half nearest to the
    boundary, half drawn at random.
    """
    # If there is room, all passed samples are recorded: sums over a batch then equal those of
    # `sweep` bit for bit.
    wanted = before.targeted | passed
    with_passed = wanted | before.passed
    if int(with_passed.sum()) <= most:
        return SampleChoice(with_passed, before.passed | passed)
    n_wanted = int(wanted.sum())
    if n_wanted <= most:
        return SampleChoice(wanted, passed)
    failed = before.targeted & ~passed
    room_for_failed = max(most - int(passed.sum()), int(FAILED_SHARE * most))
    n_failed = min(int(failed.sum()), room_for_failed)
    n_passed = most - n_failed
    n_drawn = n_passed // 2
    distance = _distance(before)
    recorded = torch.zeros_like(wanted)
    recorded[nearest(distance, failed, n_failed)] = True
    recorded[nearest(distance, passed, n_passed - n_drawn)] = True
    far = (passed & ~recorded).nonzero().flatten()
    drawn = shuffled(far, torch.Generator().manual_seed(seed))[:n_drawn]
    recorded[drawn] = True
    representative = passed
    if bool((passed & ~recorded).any()):
        representative = torch.zeros_like(passed)
        representative[drawn[:MOST_REPRESENTATIVE]] = True
    return SampleChoice(
        recorded, representative, f"on {int(recorded.sum()):,} of {n_wanted:,} samples"
    )


def _distance(before: SampleResults) -> Tensor:
    """Returns distances from the boundary, `N`, by margin or loss.

    Samples with a large weight count as nearer.
    """
    if before.has_margins:
        return before.margin.abs() / before.weight.to(before.margin)
    weight = before.weight.to(before.loss)
    return torch.where(before.passed, -before.loss * weight, before.loss / weight)


def nearest(distance: Tensor, mask: Tensor, n: int) -> Tensor:
    """Returns the rows of the `n` samples in `mask` with the smallest distances, in order."""
    rows = mask.nonzero().flatten()
    return rows[distance[rows].argsort(stable=True)[:n]]


def record_known(problem: Problem, keep: Tensor) -> ActivationCache:
    """Returns activations of the known samples in `keep`, `N` bool, under the present weights.

    Records them unless a pass has done so.

    Raises:
        ReplayError: on all ranks, if one rank cannot record a layer.
    """
    if problem.record.cache is not None:
        return problem.record.cache.only(keep)
    draw = partial(row_batches, problem.known, problem.before)
    batches = all_batches(problem.known, problem.before)
    if len(keep) > problem.n_scored and int(keep.sum()) < FEW_SHARE * len(keep):
        batches = draw(keep.nonzero().flatten())
    work = partial(
        record,
        problem.evaluator,
        batches,
        problem.space,
        keep,
        budget=half_memory_limit(problem),
        draw=draw,
    )
    return problem.collective.all_or_none(work, "known data could not be recorded on another rank.")


def scorer_for(
    problem: Problem,
    recording: ActivationCache,
    where: Tensor,
    failed: Tensor,
    passed: Tensor,
    fitness: FitnessFunction,
    reserve: Tensor | None,
) -> Scorer:
    """Builds a scorer for new values of the weights at `where`.

    It scores the recorded samples in `failed` and `passed`. If `reserve`, `N`, is given, a sample
    only passes if its margin is at least its entry in `reserve`.
    """
    before = problem.before
    return make_scorer(
        recording,
        where,
        failed,
        passed,
        problem.evaluator,
        budget=half_memory_limit(problem),
        fitness=fitness,
        fragility=before.loss,
        reserve=reserve,
        weight=before.finite_weight if before.weighted else None,
    )


def progress(
    problem: Problem, searcher: Searcher, n_passed: int
) -> Callable[[int, SearchHistory], None]:
    """Returns a callback that tells the clock how many samples the best candidate repairs."""

    def tell(done: int, history: SearchHistory) -> None:
        broken = n_passed - int(history.intact[-1])
        problem.clock.tell(done, searcher.iterations, int(history.patched[-1]), broken)

    return tell


def half_memory_limit(problem: Problem) -> int | None:
    """Returns half of `Problem.memory_limit` or None, for each of the recording and the scorer."""
    return None if problem.memory_limit is None else max(1, problem.memory_limit // 2)
