"""Records of a repair as data and JSON: steps, counts, confidence limits, provenance.

In: counts and settings of a repair. Out: frozen dataclasses, which `report` shows as pages and
figures.
"""

from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.records.provenance import Provenance, installed_versions
from lightning_nrl.records.repair_record import (
    CalibrationBounds,
    Hashes,
    Judge,
    LocalizationReport,
    RepairRecord,
    SearchReport,
    Status,
    StrengthPoint,
    WeightChange,
)
from lightning_nrl.records.splits import (
    Role,
    SetAside,
    SliceReport,
    SplitReport,
    UpdateSplit,
    pool,
    pool_updates,
)
from lightning_nrl.records.steps import CautionPoint, PricePoint, Rung, Step

__all__ = [
    "CalibrationBounds",
    "CautionPoint",
    "Hashes",
    "Judge",
    "LocalizationReport",
    "PricePoint",
    "Provenance",
    "RepairRecord",
    "Role",
    "Rung",
    "SearchReport",
    "SetAside",
    "SliceReport",
    "SplitReport",
    "Status",
    "Step",
    "StrengthPoint",
    "UpdateSplit",
    "WeightChange",
    "hash_tensors",
    "installed_versions",
    "pool",
    "pool_updates",
]
