"""Builds the report of a split from the results on its samples, before and after a repair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults
from lightning_nrl.records.splits import (
    ClassCounts,
    ConfusionCell,
    FlippedSample,
    MarginHistogram,
    Role,
    SplitReport,
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
    return SplitReport(
        split=split,
        role=role,
        counts=flips.target_counts(before, rows),
        targeted_ids=tuple(before.ids(before.targeted)[split]),
        flipped=_flipped_samples(before, after, flips, rows),
        confusion=_confusion_cells(before, after, rows),
        classes=_class_counts(before, flips, rows),
        margins=_margin_histogram(before, after, rows, margin_edges),
    )


def _flipped_samples(
    before: SampleResults, after: SampleResults, flips: Flips, rows: slice
) -> tuple[FlippedSample, ...]:
    flipped = (flips.repaired | flips.broken).nonzero().flatten()
    flipped = flipped[(flipped >= rows.start) & (flipped < rows.stop)]
    slices = (*before.names, "")  # group -1 is no slice
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
            slice=slices[int(before.group[row])],
        )
        for row in flipped.tolist()
    )


def _confusion_cells(
    before: SampleResults, after: SampleResults, rows: slice
) -> tuple[ConfusionCell, ...]:
    """Counts samples by label and prediction. Returns () if the task has no classes."""
    label, old, new = before.label[rows], before.prediction[rows], after.prediction[rows]
    if not _has_classes(label, old):
        return ()
    n_classes = 1 + max(int(old.max()), int(new.max()))
    n_before, n_after = _pair_counts(label, old, n_classes), _pair_counts(label, new, n_classes)
    return tuple(
        ConfusionCell(*divmod(pair, n_classes), n_before.get(pair, 0), n_after.get(pair, 0))
        for pair in sorted(n_before.keys() | n_after.keys())
    )


def _pair_counts(label: Tensor, prediction: Tensor, n_classes: int) -> dict[int, int]:
    # A pair is one number here, since sorting rows of two numbers takes ten times as long.
    pairs, counts = (label * n_classes + prediction).unique(return_counts=True)
    return dict(zip(pairs.tolist(), counts.tolist(), strict=True))


def _class_counts(before: SampleResults, flips: Flips, rows: slice) -> tuple[ClassCounts, ...]:
    """Counts flips by class. Returns () if the task has no classes."""
    label = before.label[rows]
    if not _has_classes(label, before.prediction[rows]):
        return ()
    n_classes = int(label.max()) + 1
    masks = (flips.kept, flips.broken, flips.repaired, flips.failing)
    columns = [label[mask[rows]].bincount(minlength=n_classes) for mask in masks]
    counts = torch.stack(columns, 1)
    present = counts.sum(1).nonzero().flatten().tolist()
    return tuple(ClassCounts(label, FlipCounts(*counts[label].tolist())) for label in present)


def margin_edges(margin: Tensor) -> tuple[float, ...]:
    """Returns edges of equally wide bins for a vector of margins, one of which is 0.

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


def _margin_histogram(
    before: SampleResults, after: SampleResults, rows: slice, edges: tuple[float, ...]
) -> MarginHistogram | None:
    if not edges:
        return None
    return MarginHistogram(
        edges, _bin_counts(before.margin[rows], edges), _bin_counts(after.margin[rows], edges)
    )


def _bin_counts(margin: Tensor, edges: tuple[float, ...]) -> tuple[int, ...]:
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    bins = torch.bucketize(margin[margin.isfinite()].double(), inner, right=True)
    return tuple(bins.bincount(minlength=len(edges) - 1).tolist())


def _has_classes(labels: Tensor, predictions: Tensor) -> bool:
    return len(labels) > 0 and bool((labels >= 0).all()) and bool((predictions >= 0).all())
