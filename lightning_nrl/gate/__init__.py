"""Gates: whether a repair may be kept (`Gate`, `judge`), and whether a new model may be released (`release`)."""

from lightning_nrl.gate.acceptance import Accuracy, Gate, Instance, Tolerance, Verdict, judge, spared
from lightning_nrl.gate.parsing import parse_rules
from lightning_nrl.gate.protected import ProtectedIntact
from lightning_nrl.gate.releasing import release
from lightning_nrl.gate.report import Identity, ReleaseReport, ReleaseRow
from lightning_nrl.gate.rules import AtMostBroken, Finding, NegativeFlipRate, NoSliceWorse, Rule
from lightning_nrl.gate.seen import Seen

__all__ = [
    "Accuracy",
    "AtMostBroken",
    "Finding",
    "Gate",
    "Identity",
    "Instance",
    "NegativeFlipRate",
    "NoSliceWorse",
    "ProtectedIntact",
    "ReleaseReport",
    "ReleaseRow",
    "Rule",
    "Seen",
    "Tolerance",
    "Verdict",
    "judge",
    "parse_rules",
    "release",
    "spared",
]
