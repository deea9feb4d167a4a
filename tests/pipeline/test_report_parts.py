"""The numbers of a report by hand: samples, classes and margins of two splits, and their sums."""

from __future__ import annotations

import torch
from torch import nn
from toy_problems import FakeTraining, normed, retrained
from toy_repairs import known, trained

from lightning_nrl import ParticleSwarm, Settings, repair_module
from lightning_nrl.evaluation.sample_results import FlipCounts, SampleResults, TargetCounts
from lightning_nrl.gate import Gate
from lightning_nrl.methods import Auto, Method, Problem, Solution
from lightning_nrl.records import WeightChange, pool
from lightning_nrl.records.split_reports import split_report
from lightning_nrl.records.splits import ClassCounts, ConfusionCell, FlippedSample, MarginHistogram

LABEL = torch.tensor([0, 0, 1, 1, 2, 0, 1])
EDGES = (-1.0, 0.0, 1.0, 2.0)


def results(prediction: list[int], margin: list[float]) -> SampleResults:
    """Five samples of `train` and two of `val`; labels as above."""
    predicted = torch.tensor(prediction)
    return SampleResults(
        splits=("train", "val"),
        sizes=(5, 2),
        index=torch.tensor([10, 11, 12, 13, 14, 0, 1]),
        label=LABEL,
        prediction=predicted,
        loss=torch.zeros(7),
        passed=predicted == LABEL,
        targeted=(predicted != LABEL) & (LABEL == 0),
        margin=torch.tensor(margin),
        slices=("night",),
        slice_number=torch.tensor([-1, 0, -1, -1, -1, -1, -1]),
        in_target=LABEL == 0,
    )


BEFORE = results([0, 1, 1, 0, 2, 1, 1], [2.0, -1.0, 0.5, -0.25, 4.0, -2.0, 1.0])
AFTER = results([0, 0, 2, 0, 2, 0, 1], [2.0, 0.5, -0.5, -0.25, 4.0, 0.25, float("nan")])


def test_a_split_by_hand():
    train = split_report("train", "known", BEFORE, AFTER, EDGES)
    assert train.counts == TargetCounts(
        2, 1, 1, 1, targeted=1, repaired_in_target=1, passed_in_target=1
    )
    assert train.flipped == (
        FlippedSample(11, "repaired", True, 0, 1, 0, -1.0, 0.5, "night"),
        FlippedSample(12, "broken", False, 1, 1, 2, 0.5, -0.5),
    )
    assert train.confusion == (
        ConfusionCell(0, 0, 1, 2),
        ConfusionCell(0, 1, 1, 0),
        ConfusionCell(1, 0, 1, 1),
        ConfusionCell(1, 1, 1, 0),
        ConfusionCell(1, 2, 0, 1),
        ConfusionCell(2, 2, 1, 1),
    )
    assert train.classes == (
        ClassCounts(0, FlipCounts(1, 0, 1, 0)),
        ClassCounts(1, FlipCounts(0, 1, 0, 1)),
        ClassCounts(2, FlipCounts(1, 0, 0, 0)),
    )
    # Margins beyond the edges are counted in the outer bins.
    assert train.margins == MarginHistogram(EDGES, (2, 1, 2), (2, 1, 2))
    val = split_report("val", "unseen", BEFORE, AFTER, EDGES)
    assert (val.repaired_ids, val.broken_ids, val.targeted_ids) == ((0,), (), (0,))
    # One margin after is NaN.
    assert val.margins == MarginHistogram(EDGES, (1, 0, 1), (0, 1, 0))
    unchanged = split_report("val", "unseen", BEFORE, BEFORE)
    assert unchanged.accuracy_after == unchanged.accuracy_before == 0.5
    assert unchanged.margins is None


def test_splits_are_pooled():
    pooled = pool([split_report(split, "known", BEFORE, AFTER, EDGES) for split in BEFORE.splits])
    assert pooled.counts == TargetCounts(
        3, 1, 2, 1, targeted=2, repaired_in_target=2, passed_in_target=1
    )
    assert pooled.classes[0] == ClassCounts(0, FlipCounts(1, 0, 2, 0))
    assert pooled.confusion[1] == ConfusionCell(0, 1, 2, 0)
    assert pooled.margins == MarginHistogram(EDGES, (3, 1, 3), (2, 2, 2))
    assert (pooled.rates["negative_flip_rate"], pooled.rates["repair_rate"]) == (1 / 7, 1)


def test_change_between_two_layers():
    old = {"a": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.tensor([0.0])}
    new = {"b": torch.tensor([1.0]), "a": torch.tensor([[3.0, 2.0], [0.0, 2.0]])}
    assert WeightChange.between(old, new) == WeightChange(
        changed=3, total=5, l2=3.0, relative=0.6, largest=2.0
    )


def test_a_rung_and_the_repair_count_the_same_weights_and_a_search_its_own_failures():
    model = trained(normed)
    settings = Settings(method=Auto(ParticleSwarm(particles=12, iterations=12)))
    training = FakeTraining(retrained(model))
    report = repair_module(model, known(), settings, training=training).report
    *_, kept = (rung for rung in report.rungs if rung.kept)
    # Statistics of the batch norm are among them.
    assert kept.weights_changed == report.change.changed > 123
    targets, held_out = report.known_counts.targeted, report.rungs[0].held_out
    assert report.search.n_failed == targets - held_out.targeted < targets


def test_batches_counted_by_a_batch_norm_are_no_changed_weights():
    class Retrained(Method):
        def __call__(self, problem: Problem) -> Solution:
            state = dict(problem.model.state_dict())
            state["2.bias"] = state["2.bias"] + torch.tensor([0.5, 0.0, 0.0])
            state["0.num_batches_tracked"] = torch.tensor(256)
            return Solution(problem.propose("retrained", state))

    model = trained(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)))
    settings = Settings(method=Retrained(), gate=Gate.tolerance(1.0))
    outcome = repair_module(model, known(), settings)
    assert outcome.report.status == "repaired"
    change = outcome.report.change
    assert (change.changed, change.total) == (1, 3)
    assert abs(change.largest - 0.5) < 1e-6
    assert outcome.changes is not None
    assert list(outcome.changes) == ["2.bias"]
    assert outcome.write(model)
    assert model.state_dict()["0.num_batches_tracked"] == 256
