"""What can be known before a repair: what can be fixed, what stands in the way, which layer has room, what it costs."""

from lightning_nrl.diagnosis.diagnosis import (
    Binding,
    Check,
    Cost,
    Diagnosis,
    Doubt,
    LayerRoom,
    Mixing,
    TargetFinding,
)
from lightning_nrl.diagnosis.run import diagnose_module

__all__ = [
    "Binding",
    "Check",
    "Cost",
    "Diagnosis",
    "Doubt",
    "LayerRoom",
    "Mixing",
    "TargetFinding",
    "diagnose_module",
]
