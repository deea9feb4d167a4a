"""The parts of a report, made from what a repair has computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lightning_nrl.evaluation.deployed_precision import DeployedPrecision, rounding_margin
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults
from lightning_nrl.report.run_records import Judge, SearchReport, WeightChange
from lightning_nrl.report.splits import (
    ClassCounts,
    ConfusionCell,
    FlippedSample,
    MarginHistogram,
    Role,
    SetAside,
    SliceReport,
    SplitReport,
    UpdateSplit,
    by_role,
    pool_updates,
)
from lightning_nrl.search.search_log import SearchResult


def split_report(
    split: str,
    role: Role,
    before: SampleResults,
    after: SampleResults | None = None,
    margin_edges: tuple[float, ...] = (),
) -> SplitReport:
    """Counts what became of the samples of one split; without `after` the weights are unchanged."""
    now = before if after is None else after
    flips, rows = Flips.between(before, now), before.of(split)
    return SplitReport(
        split=split,
        role=role,
        counts=flips.target_counts(before, rows),
        targeted_ids=tuple(before.ids(before.targeted)[split]),
        flipped=flipped_samples(before, now, flips, rows),
        confusion=confusion_cells(before, now, rows),
        classes=class_counts(before, flips, rows),
        margins=margin_histogram(before, now, rows, margin_edges),
    )


def update_text(splits: Sequence[UpdateSplit]) -> str:
    """A sentence on the known regressions; empty if no model was replaced."""
    known = by_role(splits).get("known")
    if known is None:
        return ""
    both = pool_updates(known)
    before, after, passed = both.trained.broken, both.now.broken, both.now.passed
    first = f"Of {passed:,} known samples that the replaced model gets right, the new one got {before:,} wrong"
    return f"{first}." if both.now == both.trained else f"{first} and gets {after:,} wrong now."


def slice_reports(
    role: Role, before: SampleResults, after: SampleResults | None, quotas: Mapping[str, int]
) -> list[SliceReport]:
    """Counts what became of the samples of each slice; samples in no slice are left out."""
    flips = Flips.between(before, before if after is None else after)
    groups = [(name, before.group == number) for number, name in enumerate(before.names)]
    return [SliceReport(name, role, flips.target_counts(before, rows), quotas.get(name)) for name, rows in groups]


def set_aside_samples(before: SampleResults, rows: Tensor, why: str) -> tuple[SetAside, ...]:
    """The samples of some rows, `N` bool, with the reason."""
    splits = [split for split, size in zip(before.splits, before.sizes, strict=True) for _ in range(size)]
    return tuple(
        SetAside(splits[row], int(before.index[row]), int(before.label[row]), int(before.prediction[row]), why)
        for row in rows.nonzero().flatten().tolist()
    )


def weight_change(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> WeightChange:
    """Compares tensors of the same names and shapes, in float64, on the CPU."""
    before = torch.cat([tensor.detach().flatten().cpu().double() for tensor in old.values()])
    after = torch.cat([new[name].detach().flatten().cpu().double() for name in old])
    change = after - before
    return WeightChange(
        changed=int((change != 0).sum()),
        total=len(change),
        l2=float(change.norm()),
        relative=float(change.norm() / before.norm()),
        largest=float(change.abs().max()),
    )


def judge_record(precision: DeployedPrecision, before: SampleResults, now: SampleResults) -> Judge:
    """In what known samples were counted, and how many the model of now gets right by less than rounding."""
    rounding = rounding_margin(precision, before)
    within = 0 if rounding is None else int((now.passed & (now.margin < rounding)).sum())
    return Judge(precision, rounding, within)


def search_report(result: SearchResult, n_failed: int | None = None, n_passed: int | None = None) -> SearchReport:
    """Everything but the candidate itself."""
    return SearchReport(
        iterations=result.iterations,
        stopped=result.stopped,
        fitness=float(result.fitness),
        original_fitness=float(result.original_fitness),
        history={curve.name: getattr(result.history, curve.name).tolist() for curve in fields(result.history)},
        n_failed=n_failed,
        n_passed=n_passed,
    )


REPORTED_MARGIN_BINS = 40
OUTER_MARGIN_SHARE = 0.01  # of all margins lie below the first edge, and as many above the last one
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
    ordered = finite.sort().values
    outer = int(OUTER_MARGIN_SHARE * (len(ordered) - 1))
    low, high = MARGIN_GROWTH * min(float(ordered[outer]), 0.0), MARGIN_GROWTH * max(float(ordered[-1 - outer]), 0.0)
    width = (high - low) / (REPORTED_MARGIN_BINS - 1) or 1.0
    first = math.floor(low / width)
    return tuple(width * (first + i) for i in range(REPORTED_MARGIN_BINS + 1))


def margin_histogram(
    before: SampleResults, after: SampleResults, rows: slice, edges: tuple[float, ...]
) -> MarginHistogram | None:
    """Margins of some rows, those that are not finite left out; None without edges."""
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
