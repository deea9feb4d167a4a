"""Confidence limits: what calibration samples that nothing else has looked at say of unseen data.

In: counts of broken samples. Out: upper limits on their rate, alone or after the data have chosen among candidates.
"""

from lightning_nrl.stats.binomial import Bound, binomial_cdf, lower_limit, upper_limit
from lightning_nrl.stats.post_selection import Choice, Selection, choose, limit_after

__all__ = [
    "Bound",
    "Choice",
    "Selection",
    "binomial_cdf",
    "choose",
    "limit_after",
    "lower_limit",
    "upper_limit",
]
