"""Estimates of what a method does to unseen samples; `Auto` chooses its rung by them.

Of splits with failures to repair, at most half of the samples are held out. Usually these are not
training splits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_nrl._utils.preserve import shuffled
from lightning_nrl.evaluation.sample_results import Flips, SampleResults, TargetCounts
from lightning_nrl.evaluation.stats import (
    CHANCE_STANDARD_ERRORS,
    variance_of_net_rate,
)
from lightning_nrl.methods.problem import Problem

HELD_OUT_FRACTION = 1 / 2  # of each kind of sample: targets, other failures, passed samples
# Maximum share of all known passed samples. Where it applies, fewer samples of the other kinds are
# held out too; otherwise repairs would count more than regressions.
MAX_HELD_OUT_PASSED = 1 / 5
MIN_HELD_OUT_FAILURES = 2  # targets; with fewer held-out targets there is no estimate
MAX_HELD_OUT_FAILURES = 80  # enough for an estimate; training uses the others from the start
FEWEST_REPAIRS_SHARE = 0.5  # a larger rung must repair this share of what a smaller one repairs


def draw_held_out_rows(problem: Problem) -> Tensor | None:
    """Draws the samples to hold out, `N` bool, or None if targets or passed samples are too few.

    Samples in a group are held out together. Protected samples are never held out, so neither are
    samples of their groups.
    """
    before = problem.before
    eligible = problem.came_with_failures & ~problem.related(before.protected)
    other_failures = ~before.passed & ~before.targeted
    n_passed = int((eligible & before.passed).sum())
    n_failures = int((eligible & ~before.passed).sum())
    fraction = min(
        HELD_OUT_FRACTION,
        MAX_HELD_OUT_PASSED * int(before.passed.sum()) / max(1, n_passed),
        MAX_HELD_OUT_FAILURES / max(1, n_failures),
    )
    held_out = torch.zeros_like(before.passed)
    generator = torch.Generator().manual_seed(problem.seed)
    if before.group is not None:
        held_out = eligible & _draw_groups(before, before.group, eligible, fraction, generator)
    else:
        for kind in (before.targeted, other_failures, before.passed):
            rows = (eligible & kind).nonzero().flatten()
            n = int(fraction * len(rows))
            held_out[shuffled(rows, generator)[:n]] = True
    n_targets = int((held_out & before.targeted).sum())
    if n_targets < MIN_HELD_OUT_FAILURES or not (held_out & before.passed).any():
        return None
    return held_out


def _draw_groups(
    before: SampleResults,
    group: Tensor,
    eligible: Tensor,
    fraction: float,
    generator: torch.Generator,
) -> Tensor:
    """Draws groups at random while they fit into `fraction` of each kind of `eligible` samples.

    Returns a mask of their samples, `N` bool. Passed samples of these groups in all splits, which
    cannot be used either, count for `MAX_HELD_OUT_PASSED`.
    """
    groups, place = group.unique(return_inverse=True)
    kinds = (before.targeted, ~before.passed, before.passed)
    masks = (*(eligible & kind for kind in kinds), before.passed)
    sizes = torch.stack([place[mask].bincount(minlength=len(groups)) for mask in masks], 1)
    most = fraction * sizes.sum(0)
    most[-1] = MAX_HELD_OUT_PASSED * int(before.passed.sum())
    total = torch.zeros_like(most)
    drawn = torch.zeros(len(groups), dtype=torch.bool)
    candidates = place[eligible].unique()
    for number in shuffled(candidates, generator).tolist():
        if (total + sizes[number] <= most).all():
            total += sizes[number]
            drawn[number] = True
    return drawn[place]


def estimate(before: SampleResults, after: SampleResults, rows: Tensor) -> TargetCounts:
    """Counts the flips of the held-out samples `rows`, `N` bool.

    In `before`, no sample may be held out.
    """
    return Flips.between(before, after).target_counts(before, rows)


def net_rate(counts: TargetCounts | None) -> float:
    """Returns (repaired - broken) / passed of the held-out samples, or 0 if `counts` is None."""
    return 0.0 if counts is None else (counts.repaired - counts.broken) / max(1, counts.passed)


def is_ahead(
    value: float, counts: TargetCounts | None, other_value: float, other: TargetCounts | None
) -> bool:
    """True if a rung (`value`, `counts`) is better than a smaller rung (`other_value`, `other`).

    A rung that repairs more (by `value`) is better unless its net rate is significantly lower. A
    rung that repairs less, but at least `FEWEST_REPAIRS_SHARE` times as much, is better if its net
    rate is significantly higher. A difference is significant if it exceeds `CHANCE_STANDARD_ERRORS`
    standard errors.
    """
    difference = net_rate(counts) - net_rate(other)
    variance = sum(variance_of_net_rate(rung) for rung in (counts, other) if rung is not None)
    error = CHANCE_STANDARD_ERRORS * math.sqrt(variance)
    if value > other_value:
        return difference >= -error
    return difference > error and value >= FEWEST_REPAIRS_SHARE * other_value
