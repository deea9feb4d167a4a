"""What became of single samples, of classes and of margins: records, as a report has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_nrl._utils.serialize import flat
from lightning_nrl.evaluation.sample_results import FlipCounts

__all__ = ["ClassCounts", "ConfusionCell", "Flip", "FlippedSample", "MarginHistogram"]

Flip = Literal["repaired", "broken"]


@dataclass(frozen=True)
class FlippedSample:
    """A sample that was repaired or broken.

    Attributes:
        id: its position in its data set.
        flip: which of both.
        in_target: whether it is of the kind that was to be repaired (`Target.covers`).
        label: its true class; -1 where the task has none, and likewise of the predictions.
        predicted_before: the class that it was taken for.
        predicted_after: the class that it is taken for now.
        margin_before: how far it was from being wrong, below 0 where it was wrong; NaN where the task has no margins.
        margin_after: likewise now.
        slice: the name of its slice; empty if it is in none.
    """

    id: int
    flip: Flip
    in_target: bool
    label: int
    predicted_before: int
    predicted_after: int
    margin_before: float
    margin_after: float
    slice: str = ""


@dataclass(frozen=True)
class ConfusionCell:
    """How many samples of a class were, and are, taken for another, or for what they are."""

    label: int
    prediction: int
    before: int
    after: int


@dataclass(frozen=True)
class ClassCounts:
    """What became of the samples of a class."""

    label: int
    counts: FlipCounts = field(metadata=flat())


@dataclass(frozen=True)
class MarginHistogram:
    """Margins before and after, counted between common edges.

    Attributes:
        edges: `B + 1` in ascending order; what lies outside is counted in the first and the last bin.
        before: `B` counts.
        after: likewise.
    """

    edges: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
