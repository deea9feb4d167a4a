"""Reports of repairs as data, JSON, Markdown, HTML and tables.

In: counts and settings, from `pipeline`. Out: records that hold them (`splits`, `run_records`), pages (`page`, `html`,
`tables`, `repair_facts`, `repair_report`) and figures (`repair_plot`).
"""

from importlib import import_module

# TensorBoard imports this package without torch, so names are imported lazily. Type checkers read `__init__.pyi`.
_NAMES = {
    "_utils.state": "hash_tensors",
    "report.html": "Report",
    "report.page": "Page",
    "report.repair_plot": "draw_repair repair_figures",
    "report.repair_report": "RepairReport",
    "report.provenance": "Provenance installed_versions",
    "report.run_records": "CalibrationBounds Hashes Judge LocalizationReport PricePoint RepairRecord"
    " Rung SearchReport Status Step StrengthPoint WeightChange",
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
