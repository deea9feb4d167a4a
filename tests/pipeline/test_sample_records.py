from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults
from lightning_nrl.pipeline._report_parts import split_report
from lightning_nrl.pipeline._sample_records import class_counts, confusion_cells, margin_edges, margin_histogram
from lightning_nrl.report.sample_records import ClassCounts, ConfusionCell, FlippedSample, MarginHistogram
from lightning_nrl.report.splits import pool

LABEL = torch.tensor([0, 0, 1, 1, 2, 0, 1])


def results(prediction: list[int], margin: list[float]) -> SampleResults:
    """Five samples of `train` and two of `val`; labels as above."""
    found = torch.tensor(prediction)
    return SampleResults(
        splits=("train", "val"),
        sizes=(5, 2),
        index=torch.tensor([10, 11, 12, 13, 14, 0, 1]),
        label=LABEL,
        prediction=found,
        loss=torch.zeros(7),
        passed=found == LABEL,
        targeted=torch.zeros(7, dtype=torch.bool),
        margin=torch.tensor(margin),
        names=("night",),
        group=torch.tensor([-1, 0, -1, -1, -1, -1, -1]),
        in_target=LABEL == 0,
    )


BEFORE = results([0, 1, 1, 0, 2, 1, 1], [2.0, -1.0, 0.5, -0.25, 4.0, -2.0, 1.0])
AFTER = results([0, 0, 2, 0, 2, 0, 1], [2.0, 0.5, -0.5, -0.25, 4.0, 0.25, float("nan")])
FLIPS = Flips.between(BEFORE, AFTER)
TRAIN, VAL = BEFORE.of("train"), BEFORE.of("val")


def test_each_flipped_sample_of_a_split_says_what_it_was_and_is_taken_for() -> None:
    assert split_report("train", "known", BEFORE, AFTER).flipped == (
        FlippedSample(11, "repaired", True, 0, 1, 0, -1.0, 0.5, "night"),
        FlippedSample(12, "broken", False, 1, 1, 2, 0.5, -0.5),
    )
    assert split_report("val", "known", BEFORE, AFTER).flipped == (
        FlippedSample(0, "repaired", True, 0, 1, 0, -2.0, 0.25),
    )


def test_confusions_are_counted_before_and_after() -> None:
    assert confusion_cells(BEFORE, AFTER, TRAIN) == (
        ConfusionCell(0, 0, 1, 2),
        ConfusionCell(0, 1, 1, 0),
        ConfusionCell(1, 0, 1, 1),
        ConfusionCell(1, 1, 1, 0),
        ConfusionCell(1, 2, 0, 1),
        ConfusionCell(2, 2, 1, 1),
    )


def test_classes_are_counted() -> None:
    assert class_counts(BEFORE, FLIPS, TRAIN) == (
        ClassCounts(0, FlipCounts(1, 0, 1, 0)),
        ClassCounts(1, FlipCounts(0, 1, 0, 1)),
        ClassCounts(2, FlipCounts(1, 0, 0, 0)),
    )


def test_a_task_without_classes_has_neither() -> None:
    plain = replace(BEFORE, label=torch.full_like(LABEL, -1))
    assert confusion_cells(plain, plain, TRAIN) == class_counts(plain, FLIPS, TRAIN) == ()


def test_margins_are_counted_between_edges_and_what_lies_outside_in_the_outer_bins() -> None:
    edges = (-1.0, 0.0, 1.0, 2.0)
    assert margin_histogram(BEFORE, AFTER, TRAIN, edges) == MarginHistogram(edges, (2, 1, 2), (2, 1, 2))
    # One margin after is NaN.
    assert margin_histogram(BEFORE, AFTER, VAL, edges) == MarginHistogram(edges, (1, 0, 1), (0, 1, 0))
    assert margin_histogram(BEFORE, AFTER, TRAIN, ()) is None


@pytest.mark.parametrize("margins", [[-3.0, -1.0, 2.0, 5.0], [1.0, 2.0, 3.0], [-2.0], [0.0, 0.0], [1e-9, 2e-9]])
def test_edges_span_the_margins_and_0_is_one_of_them(margins: list[float]) -> None:
    edges = margin_edges(torch.tensor([*margins, float("inf"), float("nan")]))
    assert 0.0 in edges
    assert edges[0] <= min(margins)
    assert edges[-1] >= max(margins)
    assert list(edges) == sorted(set(edges))


def test_without_margins_there_are_no_edges() -> None:
    assert margin_edges(torch.full((3,), float("nan"))) == ()


def test_splits_are_pooled() -> None:
    edges = (-1.0, 0.0, 1.0)
    both = pool([split_report(split, "known", BEFORE, AFTER, edges) for split in ("train", "val")])
    assert both.classes[0] == ClassCounts(0, FlipCounts(1, 0, 2, 0))
    assert both.confusion[1] == ConfusionCell(0, 1, 2, 0)
    assert both.margins == MarginHistogram(edges, (3, 4), (2, 4))
    assert both.flipped == ()
