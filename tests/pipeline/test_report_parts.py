from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_nrl.errors import EvaluationError
from lightning_nrl.evaluation.sample_results import SampleResults, TargetCounts
from lightning_nrl.metrics import functional
from lightning_nrl.pipeline._report_parts import split_report, weight_change
from lightning_nrl.report import SplitReport, WeightChange, pool


def evidence(passed: str, targeted: str = "", loss: float = 0.5) -> SampleResults:
    n = len(passed)
    ok = torch.tensor([sign == "+" for sign in passed])
    return SampleResults(
        splits=("train", "val"),
        sizes=(3, n - 3),
        index=torch.arange(n) * 10,
        label=torch.full((n,), -1),
        prediction=torch.full((n,), -1),
        loss=torch.full((n,), loss),
        passed=ok,
        targeted=torch.tensor([sign == "x" for sign in targeted.ljust(n)]),
        margin=torch.zeros(n),
    )


#                 train val
BEFORE = evidence("++--+--+-", "   x  x x")
AFTER = evidence("-+++++-++")


def test_a_split_counts_its_own_rows() -> None:
    val = split_report("val", "known", BEFORE, AFTER)
    assert val == SplitReport(
        split="val",
        role="known",
        counts=TargetCounts(kept=2, broken=0, repaired=3, failing=1, targeted=3, repaired_in_target=2),
        targeted_ids=(30, 60, 80),
        flipped=val.flipped,
    )
    assert (val.repaired_ids, val.broken_ids) == ((30, 50, 80), ())
    train = split_report("train", "unseen", BEFORE, AFTER)
    assert (train.kept, train.broken, train.repaired, train.failing) == (1, 1, 1, 0)
    assert (train.role, train.broken_ids, train.repaired_ids) == ("unseen", (0,), (20,))


def test_right_samples_of_the_target_are_counted_too() -> None:
    # Right before are 0, 1, 4 and 7, of which 0 breaks; in the target are 0, 4 and those that fail.
    before = replace(BEFORE, in_target=~BEFORE.passed | (BEFORE.index == 0) | (BEFORE.index == 40))
    train, val = (split_report(split, "known", before, AFTER) for split in ("train", "val"))
    assert (train.passed_in_target, train.broken_in_target) == (1, 1)
    assert (val.passed_in_target, val.broken_in_target) == (1, 0)
    assert pool([train, val]).numbers["broken_in_target"] == 1


def test_accuracies_and_rates_follow_from_the_counts() -> None:
    report = split_report("val", "known", BEFORE, AFTER)
    assert (report.n, report.passed) == (6, 2)
    assert (report.accuracy_before, report.accuracy_after) == (2 / 6, 5 / 6)
    assert report.rates == {
        "negative_flip_rate": 0.0,
        "positive_flip_rate": 3 / 6,
        "negative_flip_impact": 0.0,
        "relative_negative_flip_rate": 0.0,
        "backward_trust_compatibility": 1.0,
        "backward_error_compatibility": 1.0,
        "repair_rate": 2 / 3,  # in I_neg
        "break_rate": 0.0,
    }


def test_rates_are_those_of_the_metrics_on_predictions() -> None:
    target = torch.zeros(9, dtype=torch.int64)
    old, new = (~BEFORE.passed).long(), (~AFTER.passed).long()
    report = pool([split_report(split, "known", BEFORE, AFTER) for split in ("train", "val")])
    for name in set(report.rates) - {"repair_rate"}:
        assert report.rates[name] == pytest.approx(getattr(functional, name)(old, new, target).item())


def test_without_an_after_the_model_is_unchanged() -> None:
    report = split_report("val", "known", BEFORE)
    assert (report.kept, report.broken, report.repaired, report.failing) == (2, 0, 0, 4)
    assert (report.targeted, report.repaired_in_target) == (3, 0)
    assert report.accuracy_after == report.accuracy_before


def test_an_empty_split_has_no_accuracy() -> None:
    report = split_report("val", "known", evidence("+-+"))
    assert report.n == 0
    assert math.isnan(report.accuracy_before)
    assert math.isnan(report.accuracy_after)
    assert math.isnan(report.rates["repair_rate"])
    assert report.rates["backward_trust_compatibility"] == 1.0


def test_a_loss_that_is_not_finite_is_wrong() -> None:
    report = split_report("val", "known", BEFORE, evidence("+++++++++", loss=float("inf")))
    assert (report.kept, report.broken, report.repaired, report.failing) == (0, 2, 0, 4)


def test_tables_of_other_samples_are_refused() -> None:
    with pytest.raises(EvaluationError, match="not about the same samples"):
        split_report("val", "known", BEFORE, evidence("+++"))


def test_numbers_are_named_and_counts_stay_whole() -> None:
    numbers = split_report("val", "known", BEFORE, AFTER).numbers
    assert numbers["repaired"] == 3
    assert isinstance(numbers["repaired"], int)
    assert numbers["accuracy_after"] == 5 / 6
    assert numbers["repair_rate"] == 2 / 3


def test_pooled_splits_add_up_without_ids() -> None:
    pooled = pool([split_report(split, "known", BEFORE, AFTER) for split in ("train", "val")])
    assert pooled == SplitReport("all", "known", TargetCounts(3, 1, 4, 1, 3, 2))


def test_change_between_two_layers() -> None:
    old = {"a": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.tensor([0.0])}
    new = {"b": torch.tensor([1.0]), "a": torch.tensor([[3.0, 2.0], [0.0, 2.0]])}
    assert weight_change(old, new) == WeightChange(changed=3, total=5, l2=3.0, relative=0.6, largest=2.0)


def test_change_of_half_precision_is_measured_in_full() -> None:
    old = {"a": torch.full((1000,), 100.0, dtype=torch.bfloat16)}
    new = {"a": torch.full((1000,), 100.5, dtype=torch.bfloat16)}
    assert weight_change(old, new).l2 == pytest.approx(0.5 * math.sqrt(1000))


def test_no_change_and_no_norm() -> None:
    zero = {"a": torch.zeros(2)}
    change = weight_change(zero, zero)
    assert (change.changed, change.l2, change.largest) == (0, 0.0, 0.0)
    assert math.isnan(change.relative)
