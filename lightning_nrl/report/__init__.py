"""RepairReport: the account of a repair, as data, JSON, Markdown and a table."""

from lightning_nrl.report.calibration import CalibrationBounds, SliceLimit
from lightning_nrl.report.document import Page
from lightning_nrl.report.repair_report import RepairReport, Status, installed_versions
from lightning_nrl.report.slice_reports import SetAside, SliceReport, set_aside, slice_reports
from lightning_nrl.report.splits import Role, SplitReport, pool, split_report
from lightning_nrl.report.stages import Hashes, LocalizationReport, SearchReport, Step
from lightning_nrl.report.strength import StrengthPoint
from lightning_nrl.report.updates import UpdateSplit, pool_updates, update_split, update_words
from lightning_nrl.report.weight_change import WeightChange, hash_tensors

__all__ = [
    "CalibrationBounds",
    "Hashes",
    "LocalizationReport",
    "Page",
    "RepairReport",
    "Role",
    "SearchReport",
    "SetAside",
    "SliceLimit",
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
    "set_aside",
    "slice_reports",
    "split_report",
    "update_split",
    "update_words",
]
