"""The release gate: whether a new model may replace the old one, by rules on what became of each sample.

In: two models and data, or two files of predictions. Out: a `ReleaseReport` with a verdict for each rule.
"""

from lightning_nrl.release.model_pair import ModelPair
from lightning_nrl.release.release import release
from lightning_nrl.release.release_report import Identity, ReleaseReport, ReleaseRow
from lightning_nrl.release.rules import (
    AtMostBroken,
    Finding,
    MaxNegativeFlipRate,
    NoSliceWorse,
    ProtectedIntact,
    Rule,
    parse_rules,
)

__all__ = [
    "AtMostBroken",
    "Finding",
    "Identity",
    "MaxNegativeFlipRate",
    "ModelPair",
    "NoSliceWorse",
    "ProtectedIntact",
    "ReleaseReport",
    "ReleaseRow",
    "Rule",
    "parse_rules",
    "release",
]
