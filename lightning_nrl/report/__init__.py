"""RepairReport: the account of a repair, as data, JSON, Markdown and a table."""

from lightning_nrl.report.report import Hashes, LocalizationReport, RepairReport, SearchReport, Status, versions
from lightning_nrl.report.split import Role, SplitReport, pool, split_report
from lightning_nrl.report.weights import WeightChange, hash_tensors

__all__ = [
    "Hashes",
    "LocalizationReport",
    "RepairReport",
    "Role",
    "SearchReport",
    "SplitReport",
    "Status",
    "WeightChange",
    "hash_tensors",
    "pool",
    "split_report",
    "versions",
]
