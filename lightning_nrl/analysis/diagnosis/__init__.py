"""Diagnosis: which failures can be repaired, what stands in the way, which layers have room, and costs.

In: a model and its known data. Out: a `Diagnosis`; the model stays unchanged.
"""

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
