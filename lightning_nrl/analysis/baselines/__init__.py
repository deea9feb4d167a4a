"""What people do instead of a repair: methods without a constraint, to be compared with.

In: a `Problem`. Out: a `Solution`, as of any method; it may break anything.
"""

from lightning_nrl._utils.registry import Registry
from lightning_nrl.analysis.baselines.bcwi import Interpolation
from lightning_nrl.analysis.baselines.fine_tuning import DistilledFineTuning, FineTuning, LayerFineTuning
from lightning_nrl.analysis.baselines.retraining import FurtherTraining, Retraining, fresh_weights
from lightning_nrl.problem import Method

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

BASELINES: Registry[Method] = Registry("baseline", "the name of one, or an object such as FineTuning()", callable)
"""The baselines that can be named, with their default settings."""

BASELINES.register("layer fine-tuning")(LayerFineTuning)
BASELINES.register("fine-tuning")(FineTuning)
BASELINES.register("distillation")(DistilledFineTuning)
BASELINES.register("interpolation")(Interpolation)
BASELINES.register("further training")(FurtherTraining)
BASELINES.register("retraining")(Retraining)
