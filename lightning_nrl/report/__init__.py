"""RepairReport: the account of a repair, as data, JSON, Markdown and a table.

In: nothing but counts and what a caller writes down; `pipeline` makes the parts. Out: records (`splits`, `run_records`,
`repair_record`), and what shows them: pages (`page`, `tables`, `repair_page`, `html`) and figures (`repair_plot`).
"""

from importlib import import_module

__all__ = [
    "CalibrationBounds",
    "Hashes",
    "Judge",
    "LocalizationReport",
    "Page",
    "PricePoint",
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
    "WeightChange",
    "draw_repair",
    "hash_tensors",
    "installed_versions",
    "pool",
    "pool_updates",
    "repair_figures",
]

# TensorBoard imports this package for its tab, without torch: names are imported when they are asked for.
# Type checkers read `__init__.pyi`.
_PACKAGES = {
    "_utils.state": "hash_tensors",
    "report.page": "Page",
    "report.repair_plot": "draw_repair repair_figures",
    "report.repair_record": "RepairRecord Status",
    "report.repair_report": "RepairReport",
    "report.report": "Report",
    "report.run_records": "CalibrationBounds Hashes Judge LocalizationReport PricePoint Rung SearchReport Step"
    " StrengthPoint WeightChange installed_versions",
    "report.splits": "Role SetAside SliceReport SplitReport UpdateSplit pool pool_updates",
}
_HOMES = {name: module for module, names in _PACKAGES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"lightning_nrl.{_HOMES[name]}"), name)
    return globals()[name]
