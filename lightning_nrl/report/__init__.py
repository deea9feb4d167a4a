"""RepairReport: the account of a repair, as data, JSON, Markdown and a table.

In: nothing but counts and what a caller writes down; `pipeline` makes the parts. Out: records (`splits`, `run_records`,
`repair_report`), and what shows them: pages (`page`, `tables`, `repair_page`, `html`) and figures (`repair_figures`).
"""

from lightning_nrl._utils.state import hash_tensors
from lightning_nrl.report.page import Page, Report
from lightning_nrl.report.repair_figures import draw_repair, repair_figures
from lightning_nrl.report.repair_report import RepairReport, Status, installed_versions
from lightning_nrl.report.run_records import (
    CalibrationBounds,
    Hashes,
    Judge,
    LocalizationReport,
    PricePoint,
    Rung,
    SearchReport,
    Step,
    StrengthPoint,
    WeightChange,
)
from lightning_nrl.report.splits import Role, SetAside, SliceReport, SplitReport, UpdateSplit, pool, pool_updates

__all__ = [
    "CalibrationBounds",
    "Hashes",
    "Judge",
    "LocalizationReport",
    "Page",
    "PricePoint",
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
    "WeightChange",
    "draw_repair",
    "hash_tensors",
    "installed_versions",
    "pool",
    "pool_updates",
    "repair_figures",
]
