"""Numbers and figures of the samples that a training has learned, forgotten and never learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nrl._trainer.tracking.tags import CLASS_TAG, PART_TAG, tagged
from lightning_nrl.published.training_record import RecordedSplit, TrainingRecord
from lightning_nrl.report.figures import INK, new_figure, style_axes

MOST_MARKERS = 40  # points of a curve; more would overlap
MOST_CLASSES = 20  # with more classes, there are no curves by class
HISTORY_CARD = (4.2, 3.0)  # inches; small, so that text is large in loggers
LEARNING_COLOURS = {"learned": "#009E73", "forgotten": "#D55E00", "never_learned": "#666666"}


@dataclass(frozen=True)
class Learning:
    """Masks of the samples of a split that were right at a point of a training: `n`, or `T x n`."""

    label: Tensor  # n int64
    right: Tensor  # bool, right at the point
    was_right: Tensor  # bool, right at the point or an earlier one

    @classmethod
    def of(cls, record: RecordedSplit) -> Learning:
        return cls(record.label, record.passed[-1], record.passed.any(0))

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks: right (`learned`), right only earlier (`forgotten`), never right."""
        return {
            "learned": self.right,
            "forgotten": self.was_right & ~self.right,
            "never_learned": ~self.was_right,
        }

    @property
    def classes(self) -> list[int]:
        """The classes for separate curves: none if there is one, or more than `MOST_CLASSES`."""
        classes: list[int] = self.label.unique().tolist()
        if len(classes) == 1 or len(classes) > MOST_CLASSES:
            return []
        return classes

    def by_class(self, mask: Tensor) -> list[int]:
        return [int((self.label[mask] == label).sum()) for label in self.classes]

    def numbers(self, prefix: str, split: str) -> dict[str, float]:
        """Returns counts by tag, such as `<prefix>/<split>/learned`.

        The tag of class 3 is `<prefix>_<split>/forgotten/3`.
        """
        totals = {name: float(mask.sum()) for name, mask in self.masks.items()}
        numbers = tagged(PART_TAG, totals, name=prefix, part=split)
        for name, mask in self.masks.items():
            for label, n in zip(self.classes, self.by_class(mask), strict=True):
                tag = CLASS_TAG.format(name=prefix, split=split, number=name, label=label)
                numbers[tag] = float(n)
        return numbers


def record_figures(record: TrainingRecord) -> dict[str, Any]:
    """Returns figures by title: counts by epoch, and shares of classes wrong at the end."""
    figures = {}
    for split in record.splits:
        figures[split] = _curves(record, split)
        last = Learning.of(record.splits[split])
        if last.classes:
            figures[f"{split}, by class"] = _bars(last, split)
    return figures


def _curves(record: TrainingRecord, split: str) -> Any:
    passed = record.splits[split].passed
    label = record.splits[split].label
    was_right = passed.int().cummax(0).values > 0
    unit = "epoch"
    across = [point.epoch + 1 for point in record.points]
    if len(set(across)) < len(across):
        unit = "step"
        across = [point.step for point in record.points]
    figure = new_figure(*HISTORY_CARD)
    axes = figure.subplots()
    for name, mask in Learning(label, passed, was_right).masks.items():
        axes.plot(
            across,
            mask.sum(1).tolist(),
            color=LEARNING_COLOURS[name],
            label=name.replace("_", " "),
            marker="." if len(across) < MOST_MARKERS else None,
        )
    axes.locator_params(axis="x", integer=True)
    _finish(axes, f"{len(label):,} samples of {split}", len(label), unit, "samples")
    return figure


def _bars(last: Learning, split: str) -> Any:
    figure = new_figure(*HISTORY_CARD)
    axes = figure.subplots()
    classes = [str(label) for label in last.classes]
    sizes = torch.tensor(last.by_class(torch.ones_like(last.right)))
    below = torch.zeros(len(classes))
    for name in ("forgotten", "never_learned"):
        shares = 100 * torch.tensor(last.by_class(last.masks[name])) / sizes
        axes.bar(
            classes,
            shares.tolist(),
            bottom=below.tolist(),
            color=LEARNING_COLOURS[name],
            label=name.replace("_", " "),
        )
        below += shares
    most = max(float(below.max()), 1.0)
    _finish(axes, f"{split}: wrong at the end, by class", most, "class", "% of the class")
    return figure


def _finish(axes: Any, title: str, most: float, across: str, up: str) -> None:
    axes.set_ylim(0, 1.25 * most)  # room for the legend
    axes.set_title(title, color=INK, fontsize=10)
    axes.legend(
        frameon=False, fontsize=8, loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.2
    )
    style_axes(axes, across, up)
