"""Callbacks for a Trainer: repairs after `fit` or at chosen epochs, and tools for model updates.

In: a Trainer, and for a model update also the replaced model. Out: a repair and its report,
metrics, a loss term, interpolated weights, or a release decision.
"""

from lightning_nrl.callbacks.congruent_training import PositiveCongruentTraining, regression_loss
from lightning_nrl.callbacks.regression_metrics import RegressionMetrics
from lightning_nrl.callbacks.release_gate import ReleaseGate
from lightning_nrl.callbacks.repair import RegressionFreeRepair
from lightning_nrl.callbacks.repair_in_training import RepairInTraining
from lightning_nrl.callbacks.weight_interpolation import WeightInterpolation

__all__ = [
    "PositiveCongruentTraining",
    "RegressionFreeRepair",
    "RegressionMetrics",
    "ReleaseGate",
    "RepairInTraining",
    "WeightInterpolation",
    "regression_loss",
]
