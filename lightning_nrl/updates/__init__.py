"""Model updates: a new model replaces an old one and should break nothing that was right.

The old model is the model in use. A negative flip is a sample that the old model gets right and the
new one wrong. In: modules, checkpoints or prediction files. Out: `OldModel` and `Predictions`; loss
terms that make negative flips rare; interpolated weights; and a `ReleaseReport` that says for each
release rule if the new model satisfies it.
"""

from lightning_nrl.updates.deployed import recount
from lightning_nrl.updates.interpolation import choose_interpolation, interpolate
from lightning_nrl.updates.junit import to_junit
from lightning_nrl.updates.loss_terms import FocalDistillation, MarginHinge, Oversampler
from lightning_nrl.updates.model_pair import ModelPair
from lightning_nrl.updates.old_model import OldModel, Reference
from lightning_nrl.updates.predictions import Predictions
from lightning_nrl.updates.protected import ProtectedIntact
from lightning_nrl.updates.release import Identity, ReleaseReport, ReleaseRow, release
from lightning_nrl.updates.rule_parsing import parse_rules
from lightning_nrl.updates.rules import AtMostBroken, Rule, RuleResult
from lightning_nrl.updates.statistical_rules import (
    IsBetter,
    IsEquivalent,
    IsNonInferior,
    MaxCalibrationRise,
    MaxNegativeFlipRate,
    MinAccuracy,
    NoSliceWorse,
)
from lightning_nrl.updates.suite import RegressionSuite

__all__ = [
    "AtMostBroken",
    "FocalDistillation",
    "Identity",
    "IsBetter",
    "IsEquivalent",
    "IsNonInferior",
    "MarginHinge",
    "MaxCalibrationRise",
    "MaxNegativeFlipRate",
    "MinAccuracy",
    "ModelPair",
    "NoSliceWorse",
    "OldModel",
    "Oversampler",
    "Predictions",
    "ProtectedIntact",
    "Reference",
    "RegressionSuite",
    "ReleaseReport",
    "ReleaseRow",
    "Rule",
    "RuleResult",
    "choose_interpolation",
    "interpolate",
    "parse_rules",
    "recount",
    "release",
    "to_junit",
]
