"""What can be known before a repair: what can be fixed, what stands in the way, which layer has room, what it costs."""

from lightning_nrl.analysis.diagnosis.diagnose import diagnose_module
from lightning_nrl.analysis.diagnosis.diagnosis import Diagnosis
from lightning_nrl.analysis.diagnosis.findings import (
    Binding,
    Cost,
    DoubtfulLabel,
    HeldOutCheck,
    LayerCapacity,
    NeighbourMixing,
    TargetFinding,
)

__all__ = [
    "Binding",
    "Cost",
    "Diagnosis",
    "DoubtfulLabel",
    "HeldOutCheck",
    "LayerCapacity",
    "NeighbourMixing",
    "TargetFinding",
    "diagnose_module",
]
