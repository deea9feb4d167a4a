"""Which known samples a search looks at where there are very many: a bounded number, so that time and memory are, too.

What comes of it is counted on all known samples all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl._utils.timing import Deadline
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.problem import Problem

__all__ = ["SampleChoice", "choose_samples", "n_to_score", "preparation_seconds"]

MOST_REPRESENTATIVE = 20_000
"""Of the samples that were drawn, so many are enough for a mean over passed data."""

FAILED_SHARE = 0.5
"""Of the samples of a search, what those that fail may be."""

PREPARATION_TIME_SHARE = 0.5
"""Of the time of a search, what preparing it may take: recording, localising, the scorer."""

PREPARATION_PASSES, PREPARATION_SECONDS = 10.0, 3e-5
"""What a sample takes there: so many passes of it, to record and replay it, and forward and backward to localise; and
so many seconds however small the network is."""

FEWEST_SAMPLES = 10_000
"""However short the time is, a search looks at so many."""


@dataclass(frozen=True)
class SampleChoice:
    """The known samples that a search looks at, `N` bool each by row of the results.

    Attributes:
        recorded: all of them.
        representative: the passed ones among them that were drawn whatever their margin, for means over passed data.
        note: how many of how many, in words; empty if none is left out.
    """

    recorded: Tensor
    representative: Tensor
    note: str = ""


def n_to_score(problem: Problem, deadline: Deadline) -> int:
    """How many samples a search may look at, the same on every rank.

    As many as the problem says; fewer only where preparing it would take too large a part of the time until then.
    """
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
    """The samples of a search, at most so many.

    With no more than that, all passed ones: not only those that are asked for, so that a batch's share of a sum is, bit
    for bit, what it is in a sweep. Else the failed ones, of too many those nearest to the border; half of the rest are
    passed ones nearest to the border, which candidates break first, and half are drawn from all others.

    Args:
        before: what is known of all samples.
        failed: `N` bool, those that are to pass.
        passed: `N` bool, those that are to be kept.
        most: how many to take.
        seed: of the draw.
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
    drawn = torch.zeros_like(wanted)
    drawn[others[order[: room // 2]]] = True
    recorded, representative = chosen | drawn, passed
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
    """The `n` of some rows, `N` bool, that are nearest, of equals the first."""
    own = rows.nonzero().flatten()
    return own if len(own) <= n else own[distance[own].argsort(stable=True)[:n]]
