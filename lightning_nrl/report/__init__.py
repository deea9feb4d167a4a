"""RepairReport: the account of a repair, as data, JSON, Markdown and a table.

In: nothing but counts and what a caller writes down; `pipeline` makes the parts. Out: records (`splits`, `run_records`,
`calibration`, `repair_report`), and what shows them: pages (`page`, `tables`, `ladder`, `repair_page`), one HTML file
(`html_page`, `repair_html`) and figures (`repair_plot`).
"""

from lightning_nrl._utils.hashing import hash_tensors
from lightning_nrl.report.calibration import CalibrationBounds
from lightning_nrl.report.page import Page
from lightning_nrl.report.repair_html import html_of_repair
from lightning_nrl.report.repair_page import page_of_repair
from lightning_nrl.report.repair_plot import draw_repair, repair_figures
from lightning_nrl.report.repair_report import RepairReport, Status, installed_versions
from lightning_nrl.report.report_base import Report, html_of, page_of
from lightning_nrl.report.run_records import (
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
    "html_of",
    "html_of_repair",
    "installed_versions",
    "page_of",
    "page_of_repair",
    "pool",
    "pool_updates",
    "repair_figures",
]
