"""Reports of repairs as pages: Markdown, HTML, tables, figures, and TensorBoard's tab.

In: records, from `records`. Out: pages (`page`, `html`, `tables`, `repair_facts`, `repair_report`),
verdicts (`verdicts`) and figures (`repair_plot`).
"""

from importlib import import_module

# TensorBoard imports this package without torch, so names are imported lazily. Type checkers read
# `__init__.pyi`.
_MODULE_OF = {
    "Page": "page",
    "RepairReport": "repair_report",
    "Report": "html",
    "Verdict": "verdicts",
    "draw_repair": "repair_plot",
    "repair_figures": "repair_plot",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return globals()[name]
