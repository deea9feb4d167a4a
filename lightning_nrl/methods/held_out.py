"""Held-out estimates of what a method does to unseen samples, by which the default chooses.

Half of the samples that came in with the failures are held out, since the model was not trained on them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_nrl.evaluation.sample_results import Flips, SampleResults, TargetCounts
from lightning_nrl.methods.problem import Problem

HELD_OUT_FRACTION = 1 / 2  # of each kind of sample: targets, other failures, passed ones
# Of all known passed samples, if failed and passed data are one data set. Other kinds shrink alike, or repairs would
# count more than regressions.
MAX_HELD_OUT_PASSED = 1 / 5
MIN_HELD_OUT_FAILURES = 2  # fewer estimate nothing
MAX_HELD_OUT_FAILURES = 80  # enough for an estimate; the others are trained on from the beginning
MAX_STANDARD_ERRORS = 2.0  # smaller differences of net rates may be chance
FEWEST_REPAIRS_SHARE = 0.5  # a rung must repair this share of what a cheaper one does


def held_out_rows(problem: Problem) -> Tensor | None:
    """Draws the known samples to hold out, `N` bool, the same on every rank; None if there are too few failures."""
    before = problem.before
    came, chosen = problem.came_with_failures, torch.zeros_like(before.passed)
    generator = torch.Generator().manual_seed(problem.seed)
    # Protected samples always stay in.
    kinds = (before.targeted, ~before.passed & ~before.targeted, before.passed & ~before.protected)
    most = min(
        MAX_HELD_OUT_PASSED * int(before.passed.sum()) / max(1, int((came & kinds[-1]).sum())),
        MAX_HELD_OUT_FAILURES / max(1, int((came & ~before.passed).sum())),
    )
    for kind in kinds:
        rows = (came & kind).nonzero().flatten()
        n = int(min(HELD_OUT_FRACTION, most) * len(rows))
        chosen[rows[torch.randperm(len(rows), generator=generator)[:n]]] = True
    enough = int((chosen & before.targeted).sum()) >= MIN_HELD_OUT_FAILURES
    return chosen if enough and bool((chosen & before.passed).any()) else None


def estimate(before: SampleResults, after: SampleResults, rows: Tensor) -> TargetCounts:
    """Counts the held-out samples; `before` are the results of the whole problem."""
    return Flips.between(before, after).target_counts(before, rows)


def net_rate(counts: TargetCounts | None) -> float:
    """Returns repaired less broken held-out samples per passed one; 0 without an estimate."""
    return 0.0 if counts is None else (counts.repaired - counts.broken) / max(1, counts.passed)


def is_ahead(value: float, counts: TargetCounts | None, other_value: float, other: TargetCounts | None) -> bool:
    """True if a larger rung is better than a smaller one.

    If its repairs are worth more, its net rate must not be significantly lower, by `MAX_STANDARD_ERRORS` of the
    difference. Otherwise its net rate must be significantly higher.
    """
    ahead = net_rate(counts) - net_rate(other)
    error = MAX_STANDARD_ERRORS * math.sqrt(_variance(counts) + _variance(other))
    if value > other_value:
        return ahead >= -error
    return ahead > error and value >= FEWEST_REPAIRS_SHARE * other_value


def _variance(counts: TargetCounts | None) -> float:
    # Of a Poisson process.
    return 0.0 if counts is None else (counts.repaired + counts.broken) / max(1, counts.passed) ** 2
