from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nrl.report import RepairReport
from lightning_nrl.tracking import before_after, search_curves, verdict


def test_search_curves_have_one_entry_an_iteration(accepted: RepairReport) -> None:
    first, _, last = search_curves(accepted)
    assert first == {
        "repair/search/best_fitness": 4.25,
        "repair/search/mean_fitness": -2.0,
        "repair/search/repaired": 4.0,
        "repair/search/broken": 0.0,
        "repair/search/loss_failed": 2.5,
        "repair/search/loss_passed": 0.25,
        "repair/search/diversity": 1.0,
    }
    assert last["repair/search/repaired"] == 7.0


def test_search_curves_leave_out_what_is_not_finite(accepted: RepairReport) -> None:
    assert "repair/search/mean_fitness" not in search_curves(accepted)[1]
    assert search_curves(accepted)[1]["repair/search/best_fitness"] == 6.5


def test_broken_samples_are_those_no_longer_intact(accepted: RepairReport) -> None:
    assert accepted.search is not None
    history = {**accepted.search.history, "intact": [90.0, 88.0, 89.0]}
    report = replace(accepted, search=replace(accepted.search, history=history))
    assert [scalars["repair/search/broken"] for scalars in search_curves(report)] == [0.0, 2.0, 1.0]


def test_broken_samples_are_not_guessed(accepted: RepairReport) -> None:
    assert accepted.search is not None
    report = replace(accepted, search=replace(accepted.search, n_passed=None))
    assert all("repair/search/broken" not in scalars for scalars in search_curves(report))


def test_without_a_search_there_are_no_curves(nothing: RepairReport) -> None:
    assert search_curves(nothing) == []


def test_before_after_gives_the_state_of_every_split_twice(accepted: RepairReport) -> None:
    before, after = before_after(accepted)
    assert before == {
        "repair/train/accuracy": 80 / 90,
        "repair/train/repaired": 0.0,
        "repair/train/broken": 0.0,
        "repair/val/accuracy": 0.5,
        "repair/val/repaired": 0.0,
        "repair/val/broken": 0.0,
        "repair/val/wrong_in_target": 10.0,
        "repair/test/accuracy": 0.8,
        "repair/test/repaired": 0.0,
        "repair/test/broken": 0.0,
        "repair/test/wrong_in_target": 4.0,
    }
    assert after == {
        "repair/train/accuracy": 82 / 90,
        "repair/train/repaired": 2.0,
        "repair/train/broken": 0.0,
        "repair/val/accuracy": 0.85,
        "repair/val/repaired": 7.0,
        "repair/val/broken": 0.0,
        "repair/val/wrong_in_target": 3.0,
        "repair/test/accuracy": 0.9,
        "repair/test/repaired": 3.0,
        "repair/test/broken": 1.0,
        "repair/test/wrong_in_target": 1.0,
    }


def test_verdict_pools_the_splits_of_a_role(accepted: RepairReport) -> None:
    found = verdict(accepted)
    assert found["repair/verdict/accepted"] == 1.0
    assert found["repair/verdict/known_target_repaired"] == 0.7
    assert found["repair/verdict/known_repaired"] == 9.0
    assert found["repair/verdict/known_broken"] == 0.0
    assert found["repair/verdict/known_accuracy_gain"] == pytest.approx(9 / 110)
    assert found["repair/verdict/unseen_broken"] == 1.0
    assert found["repair/verdict/unseen_negative_flip_rate"] == 0.05
    assert found["repair/verdict/weights_changed"] == 8.0
    assert found["repair/verdict/iterations"] == 2.0
    assert found["repair/verdict/seconds"] == 2.0


def test_verdict_on_refused_weights_tells_what_they_would_have_done(refused: RepairReport) -> None:
    found = verdict(refused)
    assert found["repair/verdict/accepted"] == 0.0
    assert found["repair/verdict/known_broken"] == 0.0
    assert found["repair/verdict/refused_broken"] == 2.0
    assert found["repair/verdict/refused_repaired"] == 9.0


def test_verdict_without_a_target_or_unseen_data_has_no_such_numbers(nothing: RepairReport) -> None:
    found = verdict(nothing)
    assert found["repair/verdict/accepted"] == 0.0
    assert "repair/verdict/known_target_repaired" not in found
    assert not any("unseen" in tag for tag in found)
