"""The gate: whether a repair may be kept, by what became of all known samples.

In: what the model does before and after, and a `Gate`, which says how many samples may break. Out: a `GateDecision`,
accepted or not, with the reason.
"""

from lightning_nrl.gate.gates import (
    GATES,
    Accuracy,
    Gate,
    GateDecision,
    Instance,
    InstanceInTarget,
    Tolerance,
    check_protected,
    judge,
)

__all__ = [
    "GATES",
    "Accuracy",
    "Gate",
    "GateDecision",
    "Instance",
    "InstanceInTarget",
    "Tolerance",
    "check_protected",
    "judge",
]
