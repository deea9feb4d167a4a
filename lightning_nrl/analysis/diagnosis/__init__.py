"""Diagnosis: predicts which failures can be repaired, what prevents it, and how long it takes.

In: a model and its known data. Out: a `Diagnosis`; the model stays unchanged.
"""

from lightning_nrl.analysis.diagnosis.diagnose import diagnose_module
from lightning_nrl.analysis.diagnosis.diagnosis import Diagnosis
from lightning_nrl.analysis.diagnosis.findings import (
    Binding,
    DoubtfulLabel,
    HeldOutCheck,
    LayerCapacity,
    NeighbourMixing,
    TargetFinding,
)

__all__ = [
    "Binding",
    "Diagnosis",
    "DoubtfulLabel",
    "HeldOutCheck",
    "LayerCapacity",
    "NeighbourMixing",
    "TargetFinding",
    "diagnose_module",
]
