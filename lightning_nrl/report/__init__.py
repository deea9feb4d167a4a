"""RepairReport: the account of a repair, as data, JSON, Markdown and a table.

In: counts and what a caller writes down; `pipeline` makes the parts. Out: records (`splits`, `run_records`), and what
shows them: pages (`page`, `html`, `tables`, `repair_facts`, `repair_report`) and figures (`repair_plot`).
"""

from importlib import import_module

# TensorBoard imports this package for its tab, without torch: names are imported when they are asked for.
# Type checkers read `__init__.pyi`.
_NAMES = {
    "_utils.state": "hash_tensors",
    "report.html": "Report",
    "report.page": "Page",
    "report.repair_plot": "draw_repair repair_figures",
    "report.repair_report": "RepairReport",
    "report.run_records": "CalibrationBounds Hashes Judge LocalizationReport PricePoint Provenance RepairRecord"
    " Rung SearchReport Status Step StrengthPoint WeightChange installed_versions",
    "report.splits": "Role SetAside SliceReport SplitReport UpdateSplit pool pool_updates",
    "report.verdicts": "Verdict",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"lightning_nrl.{_MODULE_OF[name]}"), name)
    return globals()[name]
