"""The effect of a method on samples that it may not use: the one estimate that the default chooses by.

A third of the samples that came in with the failed ones are held out, since the model was not trained on them: what
becomes of them is what may be expected of unseen samples like these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_nrl.evaluation.sample_results import Flips, SampleResults, TargetCounts
from lightning_nrl.methods.problem import Problem

HELD_OUT_FRACTION = 1 / 3  # of each kind of sample: targets, other failures, passed ones
# Of all known passed samples, and as large a part of each other kind, or repairs would count for more than what breaks:
# where failed and passed data are one data set.
MAX_HELD_OUT_PASSED = 1 / 5
MIN_HELD_OUT_FAILURES = 2  # with fewer nothing can be said
MAX_STANDARD_ERRORS = 2.0  # where net rates differ by less, chance may have done it
FEWEST_REPAIRS_SHARE = 0.5  # what repairs less than this part of what a cheaper procedure does is not taken


def held_out_rows(problem: Problem) -> Tensor | None:
    """The known samples to be held out, `N` bool, the same on every rank; None where there are too few failures."""
    before = problem.before
    came, chosen = problem.came_with_failures, torch.zeros_like(before.passed)
    generator = torch.Generator().manual_seed(problem.seed)
    # What may not break at all is not to be left out.
    kinds = (before.targeted, ~before.passed & ~before.targeted, before.passed & ~before.protected)
    most = MAX_HELD_OUT_PASSED * int(before.passed.sum()) / max(1, int((came & kinds[-1]).sum()))
    for kind in kinds:
        rows = (came & kind).nonzero().flatten()
        n = int(min(HELD_OUT_FRACTION, most) * len(rows))
        chosen[rows[torch.randperm(len(rows), generator=generator)[:n]]] = True
    enough = int((chosen & before.targeted).sum()) >= MIN_HELD_OUT_FAILURES
    return chosen if enough and bool((chosen & before.passed).any()) else None


def estimate(before: SampleResults, after: SampleResults, rows: Tensor) -> TargetCounts:
    """Counts the held-out samples; `before` are the results of the whole problem."""
    return Flips.between(before, after).target_counts(before, rows)


def best_index(found: Sequence[TargetCounts | None], gains: Sequence[float]) -> int:
    """The last of the procedures, in order of what they change, that nothing speaks against.

    Held-out samples do where its net rate (0 without an estimate) is below the best one by more than
    `MAX_STANDARD_ERRORS` of the difference. What changes more repairs more, and its trial had less time and data than
    the repair. So does an earlier one that is ahead of it in net rate and in the worth of known repairs (`gains`), or
    that repairs far more: a trial may have gone well, and the repair may have had no time left.
    """
    nothing = TargetCounts(1, 0, 0, 0, 0, 0)
    known = [nothing if counts is None else counts for counts in found]
    rates = [(one.repaired - one.broken) / max(1, one.passed) for one in known]
    # Flips come about as by a Poisson process.
    variances = [(one.repaired + one.broken) / max(1, one.passed) ** 2 for one in known]
    top = max(range(len(rates)), key=lambda i: rates[i])
    errors = [MAX_STANDARD_ERRORS * math.sqrt(variances[top] + variance) for variance in variances]
    close = [i for i, rate in enumerate(rates) if i == top or rates[top] - rate <= errors[i]]

    def is_behind(i: int, j: int) -> bool:
        return gains[i] < FEWEST_REPAIRS_SHARE * gains[j] or (gains[i] < gains[j] and rates[i] < rates[j])

    return max(i for i in close if not any(is_behind(i, j) for j in close if j < i))
