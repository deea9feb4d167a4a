"""Records of samples, classes and margins, made from the results before and after."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults
from lightning_nrl.report.sample_records import ClassCounts, ConfusionCell, FlippedSample, MarginHistogram

__all__ = ["class_counts", "confusion_cells", "flipped_samples", "margin_edges", "margin_histogram"]

REPORTED_MARGIN_BINS = 40
OUTER_MARGIN_SHARE = 0.01
"""Of all margins, so many lie below the first edge, and so many above the last one."""

MARGIN_GROWTH = 1.5
"""Margins after a repair may be larger by so much and have a bin of their own."""


def flipped_samples(
    before: SampleResults, after: SampleResults, flips: Flips, rows: slice
) -> tuple[FlippedSample, ...]:
    """The repaired and the broken samples among some rows, in their order."""
    chosen = (flips.repaired | flips.broken).nonzero().flatten()
    chosen = chosen[(chosen >= rows.start) & (chosen < rows.stop)]
    columns = {
        "id": before.index,
        "in_target": before.in_target,
        "label": before.label,
        "predicted_before": before.prediction,
        "predicted_after": after.prediction,
        "margin_before": before.margin.double(),
        "margin_after": after.margin.double(),
    }
    found: dict[str, list[Any]] = {name: column[chosen].tolist() for name, column in columns.items()}
    found["flip"] = ["repaired" if repaired else "broken" for repaired in flips.repaired[chosen].tolist()]
    found["slice"] = [before.names[group] if group >= 0 else "" for group in before.group[chosen].tolist()]
    return tuple(FlippedSample(**dict(zip(found, row, strict=True))) for row in zip(*found.values(), strict=True))


def confusion_cells(before: SampleResults, after: SampleResults, rows: slice) -> tuple[ConfusionCell, ...]:
    """How many samples of each class are taken for which, before and after; none without classes."""
    labels, predictions = before.label[rows], [results.prediction[rows] for results in (before, after)]
    if not _has_classes(labels, predictions[0]):
        return ()
    n_classes = 1 + max(int(column.max()) for column in predictions)
    counts = []
    for prediction in predictions:
        # One number a pair: to sort rows of two takes ten times as long.
        pairs, n_pairs = (labels * n_classes + prediction).unique(return_counts=True)
        counts.append(dict(zip(pairs.tolist(), n_pairs.tolist(), strict=True)))
    return tuple(
        ConfusionCell(*divmod(pair, n_classes), *(own.get(pair, 0) for own in counts))
        for pair in sorted(counts[0].keys() | counts[1])
    )


def class_counts(before: SampleResults, flips: Flips, rows: slice) -> tuple[ClassCounts, ...]:
    """What became of the samples of each class among some rows; none without classes."""
    labels = before.label[rows]
    if not _has_classes(labels, before.prediction[rows]):
        return ()
    masks = (flips.kept, flips.broken, flips.repaired, flips.failing)
    counts = torch.stack([labels[mask[rows]].bincount(minlength=int(labels.max()) + 1) for mask in masks], 1)
    present = counts.sum(1).nonzero().flatten().tolist()
    return tuple(ClassCounts(label, FlipCounts(*counts[label].tolist())) for label in present)


def margin_edges(margin: Tensor) -> tuple[float, ...]:
    """Edges of bins of equal width for margins like these, `N`; 0 is one of them. None without finite margins."""
    finite = margin[margin.isfinite()].double()
    if not len(finite):
        return ()
    quantiles = finite.sort().values
    outer = int(OUTER_MARGIN_SHARE * (len(quantiles) - 1))
    low, high = min(float(quantiles[outer]), 0.0), max(float(quantiles[len(quantiles) - 1 - outer]), 0.0)
    low, high = MARGIN_GROWTH * low, MARGIN_GROWTH * high
    width = (high - low) / (REPORTED_MARGIN_BINS - 1) or 1.0
    first = math.floor(low / width)
    return tuple(width * (first + i) for i in range(REPORTED_MARGIN_BINS + 1))


def margin_histogram(
    before: SampleResults, after: SampleResults, rows: slice, edges: tuple[float, ...]
) -> MarginHistogram | None:
    """Margins before and after of some rows; those that are not finite are left out. None without edges."""
    if not edges:
        return None
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    counts = []
    for results in (before, after):
        margin = results.margin[rows].double()
        bins = torch.bucketize(margin[margin.isfinite()], inner, right=True)
        counts.append(tuple(torch.bincount(bins, minlength=len(edges) - 1).tolist()))
    return MarginHistogram(edges, *counts)


def _has_classes(labels: Tensor, predictions: Tensor) -> bool:
    return len(labels) > 0 and bool((labels >= 0).all()) and bool((predictions >= 0).all())
