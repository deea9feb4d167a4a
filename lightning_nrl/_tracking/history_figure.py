"""The record of a training as a figure: samples learned, forgotten and never learned, in all and by class."""

from __future__ import annotations

from typing import Any

from lightning_nrl._tracking.learning_curves import MOST_CLASSES, Learning
from lightning_nrl.localization import RecordedSplit, TrainingRecord
from lightning_nrl.report._figures import INK, dress, new_figure

__all__ = ["history_figure"]

WIDTH, HEIGHT = 8.4, 3.4  # inches
COLOURS = {"learned": "#009E73", "forgotten": "#D55E00", "never_learned": "#666666"}
NAMES = {"learned": "learned", "forgotten": "forgotten", "never_learned": "never learned"}


def history_figure(record: TrainingRecord, split: str) -> Any:
    """A `matplotlib.figure.Figure` of one split: counts by epoch, and each class at the end.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    found = record.splits[split]
    last = Learning.of(found)
    classes = last.label[last.seen].unique().tolist()
    by_class = 1 < len(classes) <= MOST_CLASSES and classes[0] >= 0
    figure = new_figure(WIDTH, HEIGHT)
    left, *right = figure.subplots(1, 2 if by_class else 1, squeeze=False)[0]
    curves = _curves(found)
    epochs = [point.epoch + 1 for point in record.points]
    across = epochs if len(set(epochs)) == len(epochs) else [point.step for point in record.points]
    for name, curve in curves.items():
        left.plot(across, curve, color=COLOURS[name], label=NAMES[name], marker="." if len(across) < 40 else None)
    left.set_ylim(bottom=0)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_title(f"{int(last.seen.sum()):,} samples of {split}", color=INK, fontsize=10)
    left.legend(frameon=False, fontsize=8)
    dress(left, "epoch" if across is epochs else "step", "samples")
    for axes in right:
        _bars(axes, last, classes)
    return figure


def _curves(record: RecordedSplit) -> dict[str, list[int]]:
    """Counts of every point."""
    right = record.right
    was_right = (record.passed & record.known).cummax(0).values
    seen = record.known.cummax(0).values
    masks = {"learned": right, "forgotten": was_right & ~right, "never_learned": seen & ~was_right}
    return {name: mask.sum(1).tolist() for name, mask in masks.items()}


def _bars(axes: Any, last: Learning, classes: list[int]) -> None:
    """What is not right at the end, in percent of each class."""
    start = [0.0] * len(classes)
    sizes = [max(1, int((last.label[last.seen] == one).sum())) for one in classes]
    for name in ("forgotten", "never_learned"):
        counts = [int((last.label[last.masks[name]] == one).sum()) for one in classes]
        share = [100 * count / size for count, size in zip(counts, sizes, strict=True)]
        axes.bar([str(one) for one in classes], share, bottom=start, color=COLOURS[name], label=NAMES[name])
        start = [a + b for a, b in zip(start, share, strict=True)]
    axes.set_title("wrong at the end, by class", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    dress(axes, "class", "% of the class")
