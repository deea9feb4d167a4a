"""Metrics for model updates: what an update breaks and repairs, as `torchmetrics` metrics and as functions.

In: predictions of the old and the new model and the true classes, or the counts of kept, broken, repaired and failing
samples. Out: the rates of the literature; `RATES` is the one table of them.
"""

from lightning_nrl.metrics import functional
from lightning_nrl.metrics.flip_metrics import (
    BackwardErrorCompatibility,
    BackwardTrustCompatibility,
    BreakRate,
    FlipMetric,
    NegativeFlipImpact,
    NegativeFlipRate,
    PositiveFlipRate,
    RelativeNegativeFlipRate,
    RepairRate,
)
from lightning_nrl.metrics.rates import RATES, Rate

__all__ = [
    "RATES",
    "BackwardErrorCompatibility",
    "BackwardTrustCompatibility",
    "BreakRate",
    "FlipMetric",
    "NegativeFlipImpact",
    "NegativeFlipRate",
    "PositiveFlipRate",
    "Rate",
    "RelativeNegativeFlipRate",
    "RepairRate",
    "functional",
]
