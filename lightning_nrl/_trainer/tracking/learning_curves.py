"""What a training has taught and lost so far: samples learned, forgotten and never learned, in all and by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nrl.localization import TrainingRecord
from lightning_nrl.localization.training_record import RecordedSplit
from lightning_nrl.report._figures import INK, dress, new_figure

MOST_CLASSES = 20
"""Classes up to which curves are logged for each."""


@dataclass(frozen=True)
class Learning:
    """The `n` samples of one split after some records."""

    label: Tensor  # n int64
    right: Tensor  # n bool, right at the last record
    was_right: Tensor  # n bool, right at some record

    @classmethod
    def of(cls, record: RecordedSplit) -> Learning:
        """After all records of a training that goes on."""
        return cls(record.label, record.passed[-1], record.passed.any(0))

    @property
    def masks(self) -> dict[str, Tensor]:
        """Each sample in one of three: right now; right before and wrong now; never right."""
        return {
            "learned": self.right,
            "forgotten": self.was_right & ~self.right,
            "never_learned": ~self.was_right,
        }

    def numbers(self, prefix: str, split: str) -> dict[str, float]:
        """Counts by tag: `<prefix>/<split>/learned` and so on; `<prefix>_<split>/forgotten/3` of class 3."""
        found = {}
        classes = self.label.unique().tolist()
        for name, mask in self.masks.items():
            found[f"{prefix}/{split}/{name}"] = float(mask.sum())
            if 1 < len(classes) <= MOST_CLASSES and classes[0] >= 0:
                counts = torch.bincount(self.label[mask], minlength=classes[-1] + 1).tolist()
                found |= {f"{prefix}_{split}/{name}/{one}": float(counts[one]) for one in classes}
        return found


HISTORY_CARD = (4.2, 3.0)  # inches; loggers show figures small, so that text is to be large
LEARNING_COLOURS = {"learned": "#009E73", "forgotten": "#D55E00", "never_learned": "#666666"}


def history_figures(record: TrainingRecord, split: str) -> dict[str, Any]:
    """Each a `matplotlib.figure.Figure`, by its title: counts by epoch, and up to 20 classes at the end.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    last = Learning.of(record.splits[split])
    figures = {split: _curves(record, split)}
    classes = last.label.unique().tolist()
    if 1 < len(classes) <= MOST_CLASSES and classes[0] >= 0:
        figures[f"{split}, by class"] = _bars(last, split, classes)
    return figures


def _curves(record: TrainingRecord, split: str) -> Any:
    n = len(record.splits[split].index)
    figure = new_figure(*HISTORY_CARD)
    axes = figure.subplots()
    epochs, steps = ([getattr(point, of) for point in record.points] for of in ("epoch", "step"))
    across = [epoch + 1 for epoch in epochs] if len(set(epochs)) == len(epochs) else steps
    for name, curve in _counts(record.splits[split]).items():
        marker = "." if len(across) < 40 else None
        axes.plot(across, curve, color=LEARNING_COLOURS[name], label=name.replace("_", " "), marker=marker)
    axes.set_ylim(0, 1.25 * n)  # room for the legend
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{n:,} samples of {split}", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.2)
    dress(axes, "step" if across is steps else "epoch", "samples")
    return figure


def _counts(record: RecordedSplit) -> dict[str, list[int]]:
    """Counts of every point."""
    points = Learning(record.label, record.passed, record.passed.int().cummax(0).values > 0)
    return {name: mask.sum(1).tolist() for name, mask in points.masks.items()}


def _bars(last: Learning, split: str, classes: list[int]) -> Any:
    """What is not right at the end, in percent of each class."""
    figure = new_figure(*HISTORY_CARD)
    axes = figure.subplots()
    below = [0.0] * len(classes)
    sizes = [int((last.label == one).sum()) for one in classes]
    for name in ("forgotten", "never_learned"):
        counts = [int((last.label[last.masks[name]] == one).sum()) for one in classes]
        share = [100 * count / size for count, size in zip(counts, sizes, strict=True)]
        names = [str(one) for one in classes]
        axes.bar(names, share, bottom=below, color=LEARNING_COLOURS[name], label=name.replace("_", " "))
        below = [a + b for a, b in zip(below, share, strict=True)]
    axes.set_ylim(0, 1.25 * max(*below, 1.0))
    axes.set_title(f"{split}: wrong at the end, by class", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    dress(axes, "class", "% of the class")
    return figure
