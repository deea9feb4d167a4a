"""Model updates: a new model replaces an old one and should break nothing that was right.

The old model is the model in use. A negative flip is a sample that the old model gets right and the
new one wrong. In: modules, checkpoints or prediction files. Out: `OldModel` and `Predictions`; loss
terms that make negative flips rare; and interpolated weights.
"""

from lightning_nrl.updates.interpolation import choose_interpolation, interpolate
from lightning_nrl.updates.loss_terms import FocalDistillation, MarginHinge
from lightning_nrl.updates.old_model import OldModel, Reference
from lightning_nrl.updates.oversampler import Oversampler
from lightning_nrl.updates.predictions import Predictions

__all__ = [
    "FocalDistillation",
    "MarginHinge",
    "OldModel",
    "Oversampler",
    "Predictions",
    "Reference",
    "choose_interpolation",
    "interpolate",
]
