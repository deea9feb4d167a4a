"""What people do instead of a repair: methods without a constraint, to be compared with."""

from lightning_nrl.baselines.interpolation import Interpolation
from lightning_nrl.baselines.retraining import FurtherTraining, Retraining, fresh_weights
from lightning_nrl.baselines.tuning import FineTuning, FocalDistillation, LayerFineTuning

__all__ = [
    "BASELINES",
    "FineTuning",
    "FocalDistillation",
    "FurtherTraining",
    "Interpolation",
    "LayerFineTuning",
    "Retraining",
    "fresh_weights",
]

BASELINES: dict[str, type] = {
    "layer fine-tuning": LayerFineTuning,
    "fine-tuning": FineTuning,
    "distillation": FocalDistillation,
    "interpolation": Interpolation,
    "further training": FurtherTraining,
    "retraining": Retraining,
}
"""The baselines that can be named, with their default settings."""
