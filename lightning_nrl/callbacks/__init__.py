"""Callbacks beside the repair: an update counted, trained and interpolated, and the release gate in a test.

In: a Trainer and the model that is replaced. Out: metrics in every validation, a term of the training loss, weights
between the two models, a verdict on the release; of a training, what it does to each sample.
"""

from lightning_nrl.callbacks.congruent_training import PositiveCongruentTraining, regression_loss
from lightning_nrl.callbacks.regression_metrics import RegressionMetrics
from lightning_nrl.callbacks.release_gate import ReleaseGate
from lightning_nrl.callbacks.training_history import TrainingHistory
from lightning_nrl.callbacks.weight_interpolation import WeightInterpolation

__all__ = [
    "PositiveCongruentTraining",
    "RegressionMetrics",
    "ReleaseGate",
    "TrainingHistory",
    "WeightInterpolation",
    "regression_loss",
]
