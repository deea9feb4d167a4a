"""Model updates: the old model, training losses that stay close to it, and the release gate between old and new.

In: modules, checkpoints or prediction files. Out: `OldModel` and `Predictions`, terms of a training loss, interpolated
weights, and a `ReleaseReport` with a verdict per rule.
"""

from lightning_nrl.updates.interpolation import choose_share, interpolate
from lightning_nrl.updates.loss_terms import FocalDistillation, MarginHinge, Oversampler
from lightning_nrl.updates.model_pair import ModelPair
from lightning_nrl.updates.old_model import OldModel, Reference
from lightning_nrl.updates.predictions import Predictions
from lightning_nrl.updates.release import Identity, ReleaseReport, ReleaseRow, release
from lightning_nrl.updates.rule_parsing import parse_rules
from lightning_nrl.updates.rules import (
    AtMostBroken,
    IsBetter,
    MaxNegativeFlipRate,
    NoSliceWorse,
    ProtectedIntact,
    Rule,
    RuleResult,
)

__all__ = [
    "AtMostBroken",
    "FocalDistillation",
    "Identity",
    "IsBetter",
    "MarginHinge",
    "MaxNegativeFlipRate",
    "ModelPair",
    "NoSliceWorse",
    "OldModel",
    "Oversampler",
    "Predictions",
    "ProtectedIntact",
    "Reference",
    "ReleaseReport",
    "ReleaseRow",
    "Rule",
    "RuleResult",
    "choose_share",
    "interpolate",
    "parse_rules",
    "release",
]
