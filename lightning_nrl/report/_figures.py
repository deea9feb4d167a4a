"""Figures of results, drawn without touching the global state of pyplot; what draws one registers it here."""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_nrl.errors import ConfigurationError

__all__ = ["INK", "Plotted", "dress", "figure_of", "image_of", "literal", "new_figure"]

INK, LINE_COLOUR = "#333333", "#DDDDDD"
DOTS_PER_INCH = 150


@singledispatch
def figure_of(result: object) -> Any:
    """The `matplotlib.figure.Figure` of a result, such as a `Comparison`; see `Plotted.plot`."""
    raise TypeError(f"no figure is known of a {type(result).__name__}")


class Plotted:
    """A result that has a figure (`figure_of`)."""

    def plot(self, path: str | Path | None = None) -> Any:
        """A `matplotlib.figure.Figure`, made without touching the global state of pyplot.

        Args:
            path: a file to save it to, such as `result.png`.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        figure = figure_of(self)
        if path is not None:
            figure.savefig(path, dpi=DOTS_PER_INCH)
        return figure


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    """An empty figure, in inches, that can measure text whatever the screen; see `Plotted.plot`.

    `layout` is matplotlib's; None takes no time, for axes whose places are known.
    """
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


def image_of(figure: Any) -> Any:
    """What a figure of `new_figure` shows: `height x width x 3` uint8."""
    figure.set_dpi(DOTS_PER_INCH)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def literal(text: str) -> str:
    """A text of the user's as it is, where matplotlib would take what stands between dollars for mathematics."""
    return text.replace("$", r"\$")


def dress(axes: Any, across: str, up: str) -> None:
    """Labels axes, and gives them a grid behind what is drawn and no more frame than they need."""
    axes.set_xlabel(across, color=INK, fontsize=9)
    axes.set_ylabel(up, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(axis="both", color=LINE_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
