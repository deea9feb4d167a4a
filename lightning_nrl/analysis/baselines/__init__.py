"""What people do instead of a repair: methods without a constraint, to be compared with."""

from lightning_nrl.analysis.baselines.bcwi import Interpolation
from lightning_nrl.analysis.baselines.fine_tuning import DistilledFineTuning, FineTuning, LayerFineTuning
from lightning_nrl.analysis.baselines.retraining import FurtherTraining, Retraining, fresh_weights

__all__ = [
    "BASELINES",
    "DistilledFineTuning",
    "FineTuning",
    "FurtherTraining",
    "Interpolation",
    "LayerFineTuning",
    "Retraining",
    "fresh_weights",
]

BASELINES: dict[str, type] = {
    "layer fine-tuning": LayerFineTuning,
    "fine-tuning": FineTuning,
    "distillation": DistilledFineTuning,
    "interpolation": Interpolation,
    "further training": FurtherTraining,
    "retraining": Retraining,
}
"""The baselines that can be named, with their default settings."""
