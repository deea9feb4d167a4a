"""Metrics for model updates: what an update breaks and repairs, as `torchmetrics` metrics and as functions.

In: predictions of the old and the new model and the true classes, or the counts of kept, broken, repaired and failing
samples. Out: the rates of the literature; `rates.RATES` is the one table of them.
"""

from lightning_nrl.metrics import functional
from lightning_nrl.metrics.flip_metrics import (
    BackwardErrorCompatibility,
    BackwardTrustCompatibility,
    BreakRate,
    NegativeFlipImpact,
    NegativeFlipRate,
    PositiveFlipRate,
    RelativeNegativeFlipRate,
    RepairRate,
)

__all__ = [
    "BackwardErrorCompatibility",
    "BackwardTrustCompatibility",
    "BreakRate",
    "NegativeFlipImpact",
    "NegativeFlipRate",
    "PositiveFlipRate",
    "RelativeNegativeFlipRate",
    "RepairRate",
    "functional",
]
