"""What can be known before a repair: what can be fixed, what stands in the way, which layer has room, what it costs."""

from lightning_nrl.analysis.diagnosis.diagnose_module import diagnose_module
from lightning_nrl.analysis.diagnosis.diagnosis_result import (
    Binding,
    Check,
    Cost,
    Diagnosis,
    Doubt,
    LayerRoom,
    Mixing,
    TargetFinding,
)

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
