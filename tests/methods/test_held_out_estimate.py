"""Which known samples are held out, and what is chosen by what becomes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_problems import make_problem, on_a_line
from toy_repairs import blobs, known, trained

from lightning_nrl import TensorSource
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.methods import Convex
from lightning_nrl.methods.held_out import best_index, estimate, held_out_rows, net_rate


def counts(repaired: int, broken: int, passed: int = 100, failing: int = 20) -> TargetCounts:
    return TargetCounts(passed - broken, broken, repaired, failing - repaired, failing, repaired)


def test_a_third_of_what_came_in_with_the_failed_samples_is_held_out_of_each_kind() -> None:
    own = make_problem(trained(), known())
    before, rows = own.before, held_out_rows(own)
    assert rows is not None
    came = torch.zeros_like(rows)
    came[before.of("new")] = True
    assert not (rows & ~came).any()
    for kind in (before.targeted, before.passed):
        assert int((rows & kind).sum()) == int((came & kind).sum()) // 3
    again = held_out_rows(own)
    assert again is not None
    assert torch.equal(rows, again)


def test_where_failed_and_passed_data_are_one_a_fifth_of_each_kind_is_held_out() -> None:
    own = make_problem(trained(), [replace(source, passed=True, failed=True) for source in known()])
    before, rows = own.before, held_out_rows(own)
    assert rows is not None
    for kind in (before.targeted, before.passed):
        assert int((rows & kind).sum()) == int(kind.sum()) // 5


class Placed(TensorSource):
    """Knows which samples of one data set it has."""

    @property
    def identity(self) -> Tensor:
        return torch.stack([torch.zeros_like(self.index), self.index], 1)


def test_of_what_is_in_two_splits_both_copies_are_held_out_and_one_is_counted() -> None:
    points, labels = blobs(60, 1.5)
    hard = Placed(points[:40], labels[:40], split="hard", failed=True)
    own = make_problem(trained(), [Placed(points, labels, split="train", passed=True), hard])
    rows = held_out_rows(own)
    assert rows is not None
    assert not rows[own.before.of("train")].any()
    out = own.without(rows).held_out
    assert out is not None
    assert torch.equal(out[own.before.of("hard")], rows[own.before.of("hard")])
    assert torch.equal(out[own.before.of("train")][:40], rows[own.before.of("hard")])


def test_no_fold_of_the_exact_programmes_keeps_copies_of_what_it_leaves_out() -> None:
    points, labels = blobs(240, 1.5)
    marks = [{"split": "train", "passed": True}, {"split": "hard", "failed": True}]
    copied, known_twice = ([kind(points, labels, **mark) for mark in marks] for kind in (Placed, TensorSource))
    found = Convex()(make_problem(trained(), copied)).held_out
    assert found is not None
    assert found.broken > 0
    # Where nobody knows that they are the same, copies stay, and have to stay right.
    blind = Convex()(make_problem(trained(), known_twice)).held_out
    assert blind is not None
    assert blind.broken == 0


def test_what_is_protected_stays_in() -> None:
    own = make_problem(trained(), known())
    weight = torch.where(own.before.passed, torch.inf, 1.0).double()
    assert held_out_rows(replace(own, before=replace(own.before, weight=weight))) is None


def test_of_few_failures_nothing_is_held_out() -> None:
    assert held_out_rows(on_a_line()) is None


def test_a_method_is_given_neither_targets_nor_passed_samples_that_are_held_out() -> None:
    own = make_problem(trained(), known())
    rows = held_out_rows(own)
    assert rows is not None
    without = own.without(rows)
    assert not (without.before.passed & rows).any()
    assert not (without.before.targeted & rows).any()
    assert torch.equal(without.used, ~rows)
    everything = replace(own.before, passed=torch.ones_like(own.before.passed))
    proposal = without.counted("all", {}, everything)
    assert proposal.repaired == int((own.before.targeted & ~rows).sum())
    found = estimate(own.before, everything, rows)
    assert (found.repaired, found.broken) == (int((rows & ~own.before.passed).sum()), 0)


def test_what_changes_more_is_taken_unless_held_out_samples_speak_against_it() -> None:
    assert net_rate(counts(9, 1)) == pytest.approx(0.08)
    # 0.08 and 0.07 differ by less than chance would.
    assert best_index([counts(9, 1), counts(8, 1)], [5, 9]) == best_index([counts(9, 1), counts(8, 1)], [9, 9]) == 1
    # 0.19 and -0.02 do not: their difference has a standard error of 0.056.
    assert best_index([counts(19, 0), counts(5, 7)], [5, 9]) == 0
    assert best_index([None, counts(3, 5)], [5, 9]) == 1
    assert best_index([None, counts(0, 9)], [5, 9]) == 0


def test_what_repairs_less_than_its_trial_promised_is_not_taken_for_the_trial() -> None:
    assert best_index([counts(8, 1), counts(9, 1)], [9, 2]) == 0


def test_what_repairs_less_than_a_cheaper_one_is_taken_only_if_held_out_samples_are_for_it() -> None:
    alike = [counts(9, 1), counts(8, 1)]
    assert best_index(alike, [20, 20]) == 1
    # Behind in both.
    assert best_index(alike, [20, 19]) == 0
    # Behind on known targets alone, and far behind.
    assert best_index(alike[::-1], [20, 19]) == 1
    assert best_index(alike[::-1], [20, 9]) == 0
