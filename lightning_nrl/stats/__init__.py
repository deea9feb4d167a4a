"""Confidence limits: what calibration samples that nothing else has looked at say of unseen data.

In: counts of broken samples. Out: upper limits on their rate, alone, by slice, under another mix of slices, or after
the data have chosen among candidates.
"""

from lightning_nrl.stats.binomial import Bound, binomial_cdf, lower_limit, upper_limit
from lightning_nrl.stats.mixes import MixCheck, check_mix
from lightning_nrl.stats.post_selection import Choice, Selection, choose, limit_after
from lightning_nrl.stats.slice_bounds import SliceBounds, slice_bounds
from lightning_nrl.stats.weighted import WeightedBound, weighted_bound

__all__ = [
    "Bound",
    "Choice",
    "MixCheck",
    "Selection",
    "SliceBounds",
    "WeightedBound",
    "binomial_cdf",
    "check_mix",
    "choose",
    "limit_after",
    "lower_limit",
    "slice_bounds",
    "upper_limit",
    "weighted_bound",
]
