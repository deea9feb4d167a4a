"""The change of a confusion matrix, drawn by torchmetrics and coloured by whether it is for the better."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.plot import plot_confusion_matrix

from lightning_nrl.report._figures import INK, literal
from lightning_nrl.report.sample_records import ConfusionCell

__all__ = ["MATRIX_CLASSES", "changed_classes", "draw_confusion_change"]

MATRIX_CLASSES = 16
"""A matrix of more is not legible."""
CHANGE_COLOURS = "BrBG"
"""Brown for the worse, teal for the better; colour-blind readers tell them apart."""
DARK = 0.7  # share of the deepest shade from which on text is white


def changed_classes(cells: Sequence[ConfusionCell]) -> list[int]:
    """The classes of cells that changed, in ascending order."""
    return sorted({one for cell in cells if cell.before != cell.after for one in (cell.label, cell.prediction)})


def draw_confusion_change(cells: Sequence[ConfusionCell], name: Callable[[int], str], axes: Any) -> None:
    """Draws how many more samples (fewer: below 0) of each class are taken for each class than before.

    More on the diagonal and fewer beside it is for the better. torchmetrics' colours would tell more from fewer alone.
    Classes in which nothing changed are left out.
    """
    classes = changed_classes(cells)
    place = {label: i for i, label in enumerate(classes)}
    change = torch.zeros(len(classes), len(classes), dtype=torch.long)
    for cell in cells:
        if cell.before != cell.after:
            change[place[cell.label], place[cell.prediction]] = cell.after - cell.before
    labels: list[int | str] = [literal(name(label)) for label in classes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchmetrics gives matplotlib tensors
        plot_confusion_matrix(change, axes, labels=labels, cmap=CHANGE_COLOURS)
    _recolour(axes, _improvement(change))
    axes.set_xlabel("predicted class", color=INK, fontsize=9)
    axes.set_ylabel("true class", color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)


def _improvement(change: Tensor) -> Tensor:
    return torch.where(torch.eye(len(change), dtype=torch.bool), change, -change)


def _recolour(axes: Any, improvement: Tensor) -> None:
    (image,) = axes.images
    shade = improvement.sign() * improvement.abs().sqrt()  # one sample for the worse is to be seen beside fifty others
    most = float(shade.abs().max())
    image.set_data(shade.numpy())
    image.set_clim(-most, most)
    size = 9 if len(improvement) <= MATRIX_CLASSES // 2 else 7
    for text in axes.texts:
        j, i = text.get_position()
        value = float(shade[i, j])
        text.set(fontsize=size, color="white" if abs(value) > DARK * most else INK, visible=value != 0)
        if not text.get_text().startswith("-"):
            text.set_text(f"+{text.get_text()}")
