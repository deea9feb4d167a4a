"""Searches of more known samples than they look at: which ones, and that all are judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_problems import make_problem
from toy_repairs import QUICK, known, trained

from lightning_nrl import Settings, repair_module
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.methods import Auto, Convex, LocalSearch, Problem
from lightning_nrl.methods.budget import FEWEST_SAMPLES
from lightning_nrl.methods.search_samples import choose_samples, n_to_score, preparation_seconds


def results(margin: list[float]) -> SampleResults:
    """Samples with these margins; those below 0 are targets."""
    m = torch.tensor(margin)
    index = torch.arange(len(m))
    return SampleResults(("a",), (len(m),), index, index * 0, index * 0, -m, m > 0, m < 0, m)


def test_no_more_than_asked_for_are_all_of_them() -> None:
    before, one = results([1.0, -2.0, 3.0]), torch.tensor([True, False, False])
    choice = choose_samples(before, before.targeted, one, 3, 0)
    assert choice.recorded.tolist() == [True, True, True]
    assert choice.note == ""
    few = choose_samples(before, before.targeted, one, 2, 0)
    assert few.recorded.tolist() == [True, True, False]
    assert few.representative.tolist() == [True, False, False]


def test_of_many_those_nearest_to_the_border_are_taken_and_a_draw_of_the_others() -> None:
    before = results([0.1, -5.0, 9.0, -0.5, 8.0, 0.2, 7.0, 6.0, -0.1, 5.0])
    choices = [choose_samples(before, before.targeted, before.passed, 6, seed) for seed in range(9)]
    for choice in choices:
        # Half of them may be targets: all three. Of the passed ones the nearest two, and one drawn of the others.
        assert choice.recorded[[1, 3, 8, 0, 5]].all()
        assert int(choice.recorded.sum()) == 6
        assert int(choice.representative.sum()) == 1
        assert (choice.recorded & before.passed)[choice.representative].all()
        assert not choice.representative[[0, 5]].any()
        assert choice.note == "searched on 6 of 10 samples"
    assert len({int(choice.representative.int().argmax()) for choice in choices}) > 1
    fewer = choose_samples(before, before.targeted, before.passed, 4, 0)
    assert fewer.recorded[before.targeted].tolist() == [False, True, True]
    assert int(fewer.recorded.sum()) == 4


def test_what_may_not_break_and_what_weighs_more_is_nearer() -> None:
    weight = torch.tensor([torch.inf, 1, 1, 1, 0.5, 1.8])
    before = replace(results([4.0, 3.0, 2.0, 1.0, -1.0, -3.0]), weight=weight)
    choice = choose_samples(before, before.targeted, before.passed, 2, 0)
    assert choice.recorded.tolist() == [True, False, False, False, False, True]


def timed(max_time: float | None, one_pass: float, **changes: object) -> Problem:
    """A problem of which a pass is said to have taken so long."""
    own = make_problem(trained(), known(), "2", clock=StageTimer(max_time=max_time))
    own.clock.seconds["collect"] = one_pass
    return replace(own, **changes)  # type: ignore[arg-type]


def test_the_number_of_samples_depends_on_the_clock_only_where_time_is_short() -> None:
    many = results([1.0] * 1_000_000)
    for own in (timed(None, 99.0, before=many), timed(1e6, 1.0, before=many), timed(30.0, 3.0)):
        assert n_to_score(own, own.deadline_of_method()) == 100_000
    # Half of what is left of 100 s when three passes have been kept, at 10 passes of 1 us and 30 us each.
    own = timed(100.0, 1.0, before=many, n_scored=2_000_000)
    assert 0.9 * 48.5 / 40e-6 < n_to_score(own, own.deadline_of_method()) < 48.5 / 40e-6
    assert preparation_seconds(own, 2_000_000) == pytest.approx(40.0)
    late = timed(5.0, 1.6, before=many)
    assert n_to_score(late, late.deadline_of_method()) == FEWEST_SAMPLES


@pytest.mark.parametrize("method", [LocalSearch(QUICK["method"]), Convex(), Auto(QUICK["method"])])
def test_what_no_time_is_left_for_is_not_begun(method: object) -> None:
    own = timed(60.0, 19.9)
    solution = method(own)  # type: ignore[operator]
    assert "no time" in solution.reason
    assert not set(own.clock.seconds) & {"localize", "search", "record", "solve", "fit"}


@pytest.mark.parametrize("method", [Auto(QUICK["method"]), QUICK["method"]])
def test_a_search_on_some_samples_is_judged_on_all(method: object) -> None:
    search = replace(QUICK["search"], n_scored=60)
    report = repair_module(trained(), known(), Settings(layer="2", method=method, search=search)).report
    assert report.status == "repaired"
    assert report.search is not None
    assert report.search.n_passed is not None
    assert report.search.n_passed < 60
    assert any("searched on 60 of 1" in step.note for step in report.steps)
    assert sum(split.counts.n for split in report.splits) == 180
    assert [split.broken for split in report.splits] == [0, 0]
