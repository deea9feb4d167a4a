"""Figures of the change of weights: how much of it is in which tensor, and where in one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_nrl.report._figures import INK, dress, new_figure
from lightning_nrl.report.run_records import LocalizationReport

__all__ = ["grid_of", "weight_figures"]

WIDTH, HEIGHT = 5.6, 3.6  # inches
BAR_COLOUR = "#0072B2"
PLOTTED_TENSORS, LABEL_CHARACTERS = 12, 34
GRID_ROWS, GRID_COLUMNS = 128, 256
"""Of the cells that a picture can show; of larger tensors a cell is the largest change of several weights."""


def weight_figures(changes: Mapping[str, Tensor], localization: LocalizationReport | None = None) -> dict[str, Any]:
    """Figures by title of what was added to each weight; none if nothing was.

    Args:
        changes: by the names of the state dict, whole tensors of what was added, 0 where a weight stays as it is.
        localization: which weights were searched.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    changed = {name: change.detach().cpu() for name, change in changes.items() if bool((change != 0).any())}
    if not changed:
        return {}
    norms = {name: float(torch.linalg.vector_norm(change, dtype=torch.float64)) for name, change in changed.items()}
    by_norm = sorted(norms, key=lambda name: -norms[name])
    figures = {"Weights, change by tensor": _bars(changed, norms, by_norm[:PLOTTED_TENSORS], localization)}
    figures[f"Weights, change of {by_norm[0]}"] = _map(by_norm[0], changed[by_norm[0]])
    return figures


def _bars(
    changed: Mapping[str, Tensor],
    norms: Mapping[str, float],
    names: list[str],
    localization: LocalizationReport | None,
) -> Any:
    names = names[::-1]
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.subplots()
    bars = axes.barh(range(len(names)), [norms[name] for name in names], color=BAR_COLOUR)
    counts = [f"{int((changed[name] != 0).sum()):,} of {changed[name].numel():,}" for name in names]
    axes.bar_label(bars, counts, padding=3, fontsize=8)
    labels = [name if len(name) <= LABEL_CHARACTERS else f"...{name[3 - LABEL_CHARACTERS :]}" for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.margins(x=0.3)
    axes.set_ylim(-0.6, max(len(names), 4) - 0.4)
    dress(axes, "Euclidean norm of the change; weights changed", "")
    if localization is not None and "localized" in localization.sizes:
        sizes = localization.sizes
        of = f" of {sizes['total']:,}" if "total" in sizes else ""
        axes.set_title(f"searched: {sizes['localized']:,}{of} weights", color=INK, fontsize=9, loc="left")
    return figure


def _map(name: str, change: Tensor) -> Any:
    grid = grid_of(change)
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.subplots()
    most = float(np.abs(grid).max())
    image = axes.imshow(grid, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="added to the weight")
    shape = " x ".join(map(str, change.shape))
    axes.set_xlabel(f"inputs ({shape}; white: as before)" if change.ndim > 1 else "", color=INK, fontsize=9)
    axes.set_ylabel("outputs" if change.ndim > 1 else "", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    return figure


def grid_of(change: Tensor) -> npt.NDArray[np.float64]:
    """A tensor as a matrix, outputs by inputs, of at most `GRID_ROWS x GRID_COLUMNS` cells.

    A cell of a larger one is that change of the weights it stands for which is largest, with its sign.
    """
    rows = change.reshape(change.shape[0] if change.ndim > 1 else 1, -1)
    return _thinned(_thinned(rows, GRID_COLUMNS).T, GRID_ROWS).T.double().numpy()


def _thinned(rows: Tensor, most: int) -> Tensor:
    """`n x k` to `n x most` at most; what is largest of each group of columns."""
    n_columns = rows.shape[1]
    size = -(-n_columns // most)
    if size == 1:
        return rows
    padded = torch.nn.functional.pad(rows, (0, -n_columns % size)).reshape(rows.shape[0], -1, size)
    return padded.gather(2, padded.abs().argmax(2, keepdim=True)).squeeze(2)
