"""The whole course of a search as one figure: counts, fitness, losses and diversity by iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_nrl.report._figures import INK, dress, new_figure
from lightning_nrl.report.run_records import SearchReport

__all__ = ["search_figure"]

WIDTH, HEIGHT = 8.4, 5.4  # inches
CURVE_COLOURS = ("#009E73", "#D55E00")
CURVES = {
    "best so far: samples": {"patched": "repaired", "broken": "broken"},
    "fitness": {"best": "best so far", "mean": "mean of the swarm"},
    "best so far: mean loss": {"loss_failed": "on failed", "loss_passed": "on passed"},
    "diversity of the swarm": {"diversity": "diversity"},
}
"""Panels, each with curves of `SearchHistory` and what they are called."""


def search_figure(search: SearchReport) -> Any:
    """A `matplotlib.figure.Figure` with a panel each; None where the search has no course.

    Fitness is shown from the first that breaks nothing on: at the start the mean is far below zero.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    history: dict[str, Sequence[float]] = dict(search.history)
    if search.n_passed is not None and "intact" in history:
        history["broken"] = [search.n_passed - intact for intact in history["intact"]]
    panels = {
        title: {name: curve for name, curve in curves.items() if len(history.get(name, ())) > 1}
        for title, curves in CURVES.items()
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return None
    n_rows = -(-len(panels) // 2)
    figure = new_figure(WIDTH, HEIGHT * n_rows / 2)
    axes = figure.subplots(n_rows, 2, squeeze=False).flatten()
    for own, (title, curves) in zip(axes, panels.items(), strict=False):
        for (name, label), colour, line in zip(curves.items(), CURVE_COLOURS, ("-", "--"), strict=False):
            own.plot(history[name], line, color=colour, label=label)
        if "best" in curves:
            known = [value for value in history["best"] if math.isfinite(value)] or [0.0]
            own.set_ylim(bottom=min(known) - 0.15 * (max(known) - min(known)))
        else:
            own.set_ylim(bottom=0)
        own.set_title(title, color=INK, fontsize=10)
        if len(curves) > 1:
            own.legend(frameon=False, fontsize=8)
        dress(own, "iteration", "")
    for own in axes[len(panels) :]:
        own.set_axis_off()
    return figure
