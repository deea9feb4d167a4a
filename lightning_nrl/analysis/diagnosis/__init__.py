"""What can be known before a repair: what can be fixed, what stands in the way, which layer has room, what it costs.

In: a module and its known data. Out: a `Diagnosis`: the advice and what it rests on, as data, a page and a figure.
"""

from lightning_nrl.analysis.diagnosis.diagnose import diagnose_module
from lightning_nrl.analysis.diagnosis.diagnosis_result import (
    Binding,
    Cost,
    Diagnosis,
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
