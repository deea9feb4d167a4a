from __future__ import annotations

from dataclasses import replace

from lightning_nrl._trainer.tracking.scalars import (
    further_numbers,
    outcome,
    rung_numbers,
    search_curves,
    split_numbers,
    strength_curves,
    weight_numbers,
)
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.report import RepairReport, StrengthPoint


def test_search_curves_have_one_entry_an_iteration(accepted: RepairReport) -> None:
    first, _, last = search_curves(accepted)
    assert first == {
        "repair_search/best_fitness": 4.25,
        "repair_search/mean_fitness": -2.0,
        "repair_search/repaired": 4.0,
        "repair_search/broken": 0.0,
        "repair_search/loss_failed": 2.5,
        "repair_search/loss_passed": 0.25,
        "repair_search/diversity": 1.0,
    }
    assert last["repair_search/repaired"] == 7.0


def test_search_curves_leave_out_what_is_not_finite_or_not_known(accepted: RepairReport, nothing: RepairReport) -> None:
    second = search_curves(accepted)[1]
    assert "repair_search/mean_fitness" not in second
    assert second["repair_search/best_fitness"] == 6.5
    assert search_curves(nothing) == []
    unknown = replace(accepted, search=replace(accepted.search, n_passed=None))
    assert all("repair_search/broken" not in scalars for scalars in search_curves(unknown))


def test_broken_samples_are_those_no_longer_intact(accepted: RepairReport) -> None:
    history = {**accepted.search.history, "intact": [90.0, 88.0, 89.0]}
    report = replace(accepted, search=replace(accepted.search, history=history))
    assert [scalars["repair_search/broken"] for scalars in search_curves(report)] == [0.0, 2.0, 1.0]


def test_outcome_has_the_numbers_of_a_decision_and_no_other(accepted: RepairReport) -> None:
    assert list(outcome(accepted).items()) == [
        ("repair/accepted", 1.0),
        ("repair/known_broken", 0.0),
        ("repair/known_repaired_in_target", 7.0),
        ("repair/known_repair_rate", 0.7),
        ("repair/known_accuracy", 99 / 110),
        ("repair/unseen_broken", 1.0),
        ("repair/unseen_repaired", 3.0),
        ("repair/unseen_repair_rate", 0.75),
        ("repair/unseen_break_rate", 1 / 16),
        ("repair/unseen_nfr", 0.05),
        ("repair/unseen_accuracy", 0.9),
    ]


def test_what_breaks_of_the_target_is_logged_and_shown(accepted: RepairReport) -> None:
    test = accepted.splits[2]
    counts = replace(test.counts, passed_in_target=6, broken_in_target=1)
    report = replace(accepted, splits=(*accepted.splits[:2], replace(test, counts=counts)))
    found = further_numbers(report)
    assert (found["repair_numbers/test_data/broken_in_target"], split_numbers(report)["test_data/n"]) == (1.0, 20.0)
    assert (
        "| right samples in the target | 0 | 0 | 0 | 6 |\n| **broken of these** | **0** | **0** | **0** | **1** |"
        in (report.to_markdown())
    )


def test_outcome_of_what_was_not_accepted(refused: RepairReport, nothing: RepairReport) -> None:
    """Refused weights tell what they would have done; what was not there has no number."""
    found = outcome(refused)
    names = ("repair/accepted", "repair/known_broken", "repair/refused_broken", "repair/refused_repaired")
    assert [found[name] for name in names] == [0.0, 0.0, 2.0, 9.0]
    assert outcome(nothing) == {"repair/accepted": 0.0, "repair/known_broken": 0.0, "repair/known_accuracy": 1.0}


def test_split_numbers_are_counts_accuracies_and_defined_rates(accepted: RepairReport) -> None:
    found = further_numbers(accepted)
    assert found["repair_numbers/val_data/n"] == 20.0
    assert found["repair_numbers/val_data/accuracy_before"] == 0.5
    assert found["repair_numbers/val_data/accuracy_after"] == 0.85
    assert found["repair_numbers/val_data/repair_rate"] == 0.7
    assert found["repair_numbers/test_data/negative_flip_rate"] == 0.05
    assert "repair_numbers/train_data/repair_rate" not in found
    assert found["repair_numbers/seconds"] == 2.0


def test_the_way_to_the_patch_begins_where_nothing_is_changed(accepted: RepairReport) -> None:
    path = (
        StrengthPoint(0.6, 5, FlipCounts(90, 0, 6, 14), FlipCounts(18, 1, 2, 4)),
        StrengthPoint(1.15, 8, FlipCounts(89, 1, 10, 10), FlipCounts(17, 2, 3, 3)),
    )
    found = strength_curves(replace(accepted, strength=path, chosen_strength=0.6))
    assert list(found) == [0, 60, 115]
    assert set(found[0].values()) == {0.0}
    assert found[115] == {
        "repair_strength/repaired_in_target": 8.0,
        "repair_strength/known_repaired": 10.0,
        "repair_strength/known_broken": 1.0,
        "repair_strength/calibration_repaired": 3.0,
        "repair_strength/calibration_broken": 2.0,
    }


def test_each_rung_and_the_localised_weights_have_numbers(accepted: RepairReport) -> None:
    assert rung_numbers(accepted) | weight_numbers(accepted) == {
        "rung_search/repaired_in_target": 7.0,
        "rung_search/repaired": 9.0,
        "rung_search/broken": 0.0,
        "rung_search/weights_changed": 8.0,
        "rung_search/seconds": 1.5,
        "rung_search/held_out_repaired": 2.0,
        "rung_search/held_out_broken": 1.0,
        "rung_exact/repaired_in_target": 5.0,
        "rung_exact/repaired": 5.0,
        "rung_exact/broken": 0.0,
        "rung_exact/weights_changed": 640.0,
        "rung_exact/seconds": 0.25,
        "localization/n_g": 20.0,
        "localization/localized": 8.0,
        "localization/total": 640.0,
        "weights_changed": 8.0,
    }
