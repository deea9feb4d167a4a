"""The release gate: rules that a new model must satisfy before it replaces the old one.

In: two models, checkpoints or files of predictions, and rules. Out: a `ReleaseReport` that says for
each rule if the new model satisfies it; a suite of samples that must stay right; and a recount of a
repair after a conversion.
"""

from lightning_nrl.release.deployed import recount
from lightning_nrl.release.junit import to_junit
from lightning_nrl.release.model_pair import ModelPair
from lightning_nrl.release.protected import ProtectedIntact
from lightning_nrl.release.release_report import Identity, ReleaseReport, ReleaseRow, release
from lightning_nrl.release.rule_parsing import parse_rules
from lightning_nrl.release.rules import AtMostBroken, Rule, RuleResult
from lightning_nrl.release.statistical_rules import (
    IsBetter,
    IsEquivalent,
    IsNonInferior,
    MaxCalibrationRise,
    MaxNegativeFlipRate,
    MinAccuracy,
    NoSliceWorse,
)
from lightning_nrl.release.suite import RegressionSuite

__all__ = [
    "AtMostBroken",
    "Identity",
    "IsBetter",
    "IsEquivalent",
    "IsNonInferior",
    "MaxCalibrationRise",
    "MaxNegativeFlipRate",
    "MinAccuracy",
    "ModelPair",
    "NoSliceWorse",
    "ProtectedIntact",
    "RegressionSuite",
    "ReleaseReport",
    "ReleaseRow",
    "Rule",
    "RuleResult",
    "parse_rules",
    "recount",
    "release",
    "to_junit",
]
