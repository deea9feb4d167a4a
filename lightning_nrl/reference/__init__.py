"""The model that an update replaces: what it gets right, and training that stays close to it.

In: a module, a checkpoint or a file of predictions. Out: `OldModel` and `Predictions`, terms of a training loss, and
weights between two models.
"""

from lightning_nrl.reference.interpolation import choose_share, interpolate
from lightning_nrl.reference.loss_terms import FocalDistillation, MarginHinge
from lightning_nrl.reference.old_model import OldModel, Reference
from lightning_nrl.reference.oversampling import Oversampler
from lightning_nrl.reference.predictions import Predictions

__all__ = [
    "FocalDistillation",
    "MarginHinge",
    "OldModel",
    "Oversampler",
    "Predictions",
    "Reference",
    "choose_share",
    "interpolate",
]
