"""Builds the report of a split from the results on its samples, before and after a repair."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_nrl.evaluation import FlipCounts, Flips, SampleResults
from lightning_nrl.records.splits import (
    ClassCounts,
    ConfusionCell,
    FlippedSample,
    MarginHistogram,
    Pairs,
    Role,
    SplitReport,
    confusion_cells,
)

REPORTED_MARGIN_BINS = 40
# The histogram ignores this share of all margins at either end when it sets its range.
OUTER_MARGIN_SHARE = 0.01
MARGIN_GROWTH = 1.5  # factor on the range, since margins grow in a repair


def split_report(
    split: str,
    role: Role,
    before: SampleResults,
    after: SampleResults,
    margin_edges: tuple[float, ...] = (),
) -> SplitReport:
    """Builds the report of one split. `margin_edges` bound the bins of the margin histogram."""
    flips, rows = Flips.between(before, after), before.of(split)
    label, prediction = before.label[rows], before.prediction[rows]
    confusion: tuple[ConfusionCell, ...] = ()
    classes: tuple[ClassCounts, ...] = ()
    if len(label) and bool((label >= 0).all()) and bool((prediction >= 0).all()):
        confusion = confusion_cells(
            _pairs(label, prediction), _pairs(label, after.prediction[rows])
        )
        classes = _class_counts(label, flips, rows)
    margins = None
    if margin_edges:
        counts_before = _bin_counts(before.margin[rows], margin_edges)
        counts_after = _bin_counts(after.margin[rows], margin_edges)
        margins = MarginHistogram(margin_edges, counts_before, counts_after)
    return SplitReport(
        split=split,
        role=role,
        counts=flips.target_counts(before, rows),
        targeted_ids=tuple(before.ids(before.targeted)[split]),
        flipped=_flipped_samples(before, after, flips, rows),
        confusion=confusion,
        classes=classes,
        margins=margins,
        failed_ids=tuple(before.ids(flips.repaired | flips.failing)[split]),
    )


def _flipped_samples(
    before: SampleResults, after: SampleResults, flips: Flips, rows: slice
) -> tuple[FlippedSample, ...]:
    flipped = (flips.repaired | flips.broken)[rows].nonzero().flatten() + rows.start
    slices = (*before.slices, "")  # number -1 is no slice
    return tuple(
        FlippedSample(
            id=int(before.index[row]),
            flip="repaired" if flips.repaired[row] else "broken",
            in_target=bool(before.in_target[row]),
            label=int(before.label[row]),
            predicted_before=int(before.prediction[row]),
            predicted_after=int(after.prediction[row]),
            margin_before=float(before.margin[row]),
            margin_after=float(after.margin[row]),
            slice=slices[int(before.slice_number[row])],
        )
        for row in flipped.tolist()
    )


def _pairs(label: Tensor, prediction: Tensor) -> Pairs:
    return Pairs(zip(label.tolist(), prediction.tolist(), strict=True))


def _class_counts(label: Tensor, flips: Flips, rows: slice) -> tuple[ClassCounts, ...]:
    n_classes = int(label.max()) + 1
    masks = (flips.kept, flips.broken, flips.repaired, flips.failing)
    columns = [label[mask[rows]].bincount(minlength=n_classes) for mask in masks]
    counts = enumerate(torch.stack(columns, 1).tolist())
    return tuple(ClassCounts(number, FlipCounts(*row)) for number, row in counts if any(row))


def margin_edges(margin: Tensor) -> tuple[float, ...]:
    """Returns edges of equally wide bins for a vector of margins; an edge is 0.

    Returns () if no margin is finite.
    """
    ordered = margin[margin.isfinite()].double().sort().values
    if not len(ordered):
        return ()
    outer = int(OUTER_MARGIN_SHARE * (len(ordered) - 1))
    low = MARGIN_GROWTH * min(float(ordered[outer]), 0.0)
    high = MARGIN_GROWTH * max(float(ordered[-1 - outer]), 0.0)
    width = (high - low) / (REPORTED_MARGIN_BINS - 1) or 1.0
    first = math.floor(low / width)
    return tuple(width * (first + i) for i in range(REPORTED_MARGIN_BINS + 1))


def _bin_counts(margin: Tensor, edges: Sequence[float]) -> tuple[int, ...]:
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    bins = torch.bucketize(margin[margin.isfinite()].double(), inner, right=True)
    return tuple(bins.bincount(minlength=len(edges) - 1).tolist())
