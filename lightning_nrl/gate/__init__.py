"""The gate: accepts or refuses a repair by its effect on all known samples.

In: results before and after the repair, and a `Gate`, a limit on broken samples. Out: a
`GateDecision` with the reason.
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
