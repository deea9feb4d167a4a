"""Figures of results, drawn without touching the global state of pyplot: one palette, one look."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_nrl.errors import ConfigurationError

INK, LINE_COLOUR, GREY = "#333333", "#DDDDDD", "#999999"
BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#005A42", "#E69F00"
PALETTE = (BLUE, RED, GREEN, "#CC79A7", "#56B4E9", "#B8860B", "#000000", "#7F7F7F", "#882255")
"""Okabe and Ito's colours, for colour-blind readers too, with a darker green and yellow, and Tol's wine."""
TONE_COLOURS = {"good": "#00795C", "warn": "#8C6700", "bad": "#991400"}
DOTS_PER_INCH = 150


class Plotted(ABC):
    """A result that has a figure."""

    @abstractmethod
    def figure(self) -> Any: ...

    def plot(self, path: str | Path | None = None) -> Any:
        """A `matplotlib.figure.Figure`, made without touching pyplot, and saved to `path` if one is given.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        figure = self.figure()
        if path is not None:
            figure.savefig(path, dpi=DOTS_PER_INCH)
        return figure


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    """An empty figure, in inches, that can measure text whatever the screen; without a layout it takes no time."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            "`plot`: matplotlib is not installed.", "install it: `pip install lightning_nrl[plots]`."
        ) from error
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def panel_grid(n_panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with as many axes, two a row, and each row of this height in inches."""
    n_rows = max(1, -(-n_panels // 2))
    figure = new_figure(width, height * n_rows)
    axes = figure.subplots(n_rows, 2, squeeze=False).flatten().tolist()
    for unused in axes[n_panels:]:
        unused.set_axis_off()
    return figure, axes[:n_panels]


def image_of(figure: Any) -> Any:
    """Renders a figure of `new_figure`: `height x width x 3` uint8."""
    figure.set_dpi(DOTS_PER_INCH)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def literal(text: str) -> str:
    """A text of the user's as it is, where matplotlib would take what stands between dollars for mathematics."""
    return text.replace("$", r"\$")


def shorten_name(name: str, most: int) -> str:
    """The end of a long name, which tells it from its neighbours."""
    return name if len(name) <= most else f"...{name[3 - most :]}"


def label_axes(axes: Any, across: str, up: str) -> None:
    """Labels axes in the colour and the size of all figures."""
    axes.set_xlabel(across, color=INK, fontsize=9)
    axes.set_ylabel(up, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)


def dress(axes: Any, across: str, up: str, grid: Literal["both", "x", "y"] = "both") -> None:
    """Labels axes, and gives them a grid behind what is drawn and no more frame than they need."""
    label_axes(axes, across, up)
    axes.grid(axis=grid, color=LINE_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
