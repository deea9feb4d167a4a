"""Metrics for model updates: what an update breaks and repairs, as `torchmetrics` metrics and as functions."""

from lightning_nrl.metrics import functional
from lightning_nrl.metrics.compatibility import BackwardErrorCompatibility, BackwardTrustCompatibility
from lightning_nrl.metrics.flip_rates import (
    NegativeFlipImpact,
    NegativeFlipRate,
    PositiveFlipRate,
    RelativeNegativeFlipRate,
)
from lightning_nrl.metrics.repair_rates import BreakRate, RepairRate

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
