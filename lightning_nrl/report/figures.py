"""The style of all figures. They are drawn without pyplot, since its state is global."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from lightning_nrl.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LINE_COLOUR, GREY = "#333333", "#DDDDDD", "#999999"
BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#005A42", "#E69F00"
PALETTE = (BLUE, RED, GREEN, "#CC79A7", "#56B4E9", "#B8860B", "#000000", "#7F7F7F", "#882255")
"""Okabe and Ito's colours, which colour-blind readers tell apart, with Tol's wine.

Green and yellow are darker.
"""
TONE_COLOURS = {"good": "#00795C", "warn": "#8C6700", "bad": "#991400"}
DOTS_PER_INCH = 150


class Plotted(ABC):
    """Base class of results that can be drawn as a figure."""

    @abstractmethod
    def figure(self) -> Figure: ...

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws a `matplotlib.figure.Figure` without pyplot, and saves it to `path` if given.

        Raises a `ConfigurationError` if matplotlib is not installed.
        """
        figure = self.figure()
        if path is not None:
            figure.savefig(path, dpi=DOTS_PER_INCH)
        return figure


def new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """Creates an empty figure on an Agg canvas. Its width and height are in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            "`plot`: matplotlib is not installed.",
            "install it: `pip install lightning_nrl[plots]`.",
        ) from error
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def image_of(figure: Figure) -> npt.NDArray[np.uint8]:
    """Renders a figure as pixels, an array of shape `height x width x 3`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: npt.NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return pixels


def escape_dollars(text: str) -> str:
    """Escapes dollar signs, which matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


def label_axes(axes: Axes, across: str, up: str) -> None:
    """Labels both axes."""
    axes.set_xlabel(across, color=INK, fontsize=9)
    axes.set_ylabel(up, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)


def style_axes(axes: Axes, across: str, up: str, grid: Literal["both", "x", "y"] = "both") -> None:
    """Labels axes, draws a grid behind the data and hides the top and right spines."""
    label_axes(axes, across, up)
    axes.grid(axis=grid, color=LINE_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
