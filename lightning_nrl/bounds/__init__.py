"""What calibration samples that nothing else has looked at say of unseen data."""

from lightning_nrl.bounds.binomial import Bound, binomial_cdf, lower_limit, upper_limit
from lightning_nrl.bounds.choosing import Choice, choose
from lightning_nrl.bounds.mixes import MixCheck, check_mix
from lightning_nrl.bounds.slices import SliceBounds, slice_bounds
from lightning_nrl.bounds.weighted import WeightedBound, weighted_bound

__all__ = [
    "Bound",
    "Choice",
    "MixCheck",
    "SliceBounds",
    "WeightedBound",
    "binomial_cdf",
    "check_mix",
    "choose",
    "lower_limit",
    "slice_bounds",
    "upper_limit",
    "weighted_bound",
]
