"""All figures of a repair for a reviewer: those of the report, the search in full, the weights that changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_nrl.report.repair_plot import repair_figures
from lightning_nrl.report.repair_report import RepairReport
from lightning_nrl.report.search_plot import search_figure
from lightning_nrl.report.weight_plot import weight_figures

__all__ = ["SEARCH_TITLE", "reviewer_figures"]

SEARCH_TITLE = "Course of the search"


def reviewer_figures(report: RepairReport, changes: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Each a `matplotlib.figure.Figure`; those without data are left out.

    Args:
        report: of the repair.
        changes: by the names of the state dict, whole tensors of what was added; None if that is not known.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figures = repair_figures(report)
    in_full = None if report.search is None else search_figure(report.search)
    if in_full is not None:
        figures[SEARCH_TITLE] = in_full
    return figures | weight_figures(changes or {}, report.localization)
