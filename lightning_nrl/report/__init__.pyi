from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.report.html import Report
from lightning_nrl.report.page import Page
from lightning_nrl.report.provenance import Provenance, installed_versions
from lightning_nrl.report.repair_plot import draw_repair, repair_figures
from lightning_nrl.report.repair_report import RepairReport
from lightning_nrl.report.run_records import (
    CalibrationBounds,
    Hashes,
    Judge,
    LocalizationReport,
    PricePoint,
    RepairRecord,
    Rung,
    SearchReport,
    Status,
    Step,
    StrengthPoint,
    WeightChange,
)
from lightning_nrl.report.splits import Role, SetAside, SliceReport, SplitReport, UpdateSplit, pool, pool_updates
from lightning_nrl.report.verdicts import Verdict

__all__ = [
    "CalibrationBounds",
    "Hashes",
    "Judge",
    "LocalizationReport",
    "Page",
    "PricePoint",
    "Provenance",
    "RepairRecord",
    "RepairReport",
    "Report",
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
    "Verdict",
    "WeightChange",
    "draw_repair",
    "hash_tensors",
    "installed_versions",
    "pool",
    "pool_updates",
    "repair_figures",
]
