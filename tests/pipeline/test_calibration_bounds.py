"""What is said of an accepted repair after calibration data have chosen its strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from benchmarks.strengths import CONFIDENCE, trials
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_lines import PATCH, Line, aside, line, problem
from toy_repairs import blobs, known, quick, trained

from lightning_nrl import ConfigurationError, Gate, TensorSource, repair_module
from lightning_nrl._utils.state import State
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.targets import AllFailures
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.methods import Problem, Solution
from lightning_nrl.pipeline import Outcome
from lightning_nrl.pipeline.strength import LIMIT_STATES, LIMIT_STRENGTHS, line_search
from lightning_nrl.report import RepairReport
from lightning_nrl.report.stats import Selection, binomial_cdf, choose, limit_after, limit_at_level, upper_limit

WRONG = line(0.1, 0.3, 0.5, 0.95, 1.1, split="wrong")
SAFE = line(1.2, 9, split="right", label=0)


def test_the_limit_by_hand() -> None:
    assert LIMIT_STATES == 26 + 19
    assert limit_after(4, 908, Selection(), 0.95) == pytest.approx(upper_limit(4, 908), abs=1e-12)
    assert limit_after(4, 908, Selection(3), 0.95) == pytest.approx(limit_at_level(4, 908, 0.05 / 3), abs=1e-12)
    assert limit_after(4, 908, Selection(45, True, 9), 0.95) == pytest.approx(limit_at_level(9, 908, 0.04), abs=1e-12)
    assert limit_after(4, 908, Selection(45, True), 0.95) == pytest.approx(limit_at_level(4, 908, 0.01 / 45), abs=1e-12)
    assert limit_after(4, 908, Selection(45), 0.95) == pytest.approx(limit_at_level(4, 908, 0.05 / 45), abs=1e-12)
    assert limit_after(0, 0, Selection(45, True, 3), 0.95) == 1.0


@given(st.integers(50, 400), st.integers(0, 5), st.lists(st.integers(0, 9), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_walk_up_to_a_count_is_a_fixed_sequence_test_of_its_limit(n: int, allowed: int, counts: list[int]) -> None:
    limit = limit_after(0, n, Selection(LIMIT_STATES, True, allowed), 0.95)
    end = next((i for i, k in enumerate(counts) if k > allowed), len(counts))
    assert choose(counts, n, limit, confidence=0.96).accepted == tuple(range(end))


@pytest.mark.parametrize(
    ("how", "chosen", "selection"),
    [
        ({"fixed": 0.6}, 0.6, Selection()),
        # 1.1 is repaired from 1.15 on, and at 1.3 something known breaks: the data had a say in one step.
        ({}, 1.15, Selection(2)),
        ({"limit": Gate.parse("tolerance:1")}, 0.7, Selection(LIMIT_STATES, True, 1)),
        ({"limit": Gate.parse("tolerance:50%")}, 0.7, Selection(LIMIT_STATES, True, 1)),
        # What it allows depends on what is repaired.
        ({"limit": Gate.accuracy()}, 0.55, Selection(LIMIT_STATES)),
    ],
)
def test_what_say_calibration_data_had(how: Any, chosen: float, selection: Selection) -> None:
    own = problem(WRONG, SAFE if not how else line(0.9, 1.2, 1.25, 9, split="right", label=0))
    crossings = (0.7, 9) if not how else (0.57, 0.72, 9)
    data = aside(own, *([line(*crossings, label=0)]), *([line(9.0, split="wrong too")] if how else []))
    found = line_search(own, PATCH, Gate.instance(), calibration=data, **how)
    assert (found.chosen, found.selection) == (chosen, selection)


def test_without_calibration_data_they_had_no_say() -> None:
    assert line_search(problem(WRONG, SAFE), PATCH, Gate.instance()).selection == Selection()


def test_a_polished_strength_is_none_that_a_walk_accepts() -> None:
    own = problem(WRONG, line(0.9, 1.2, 1.25, 9, split="right", label=0))
    data = aside(own, line(0.57, 0.72, 9, 9.5, label=0))
    found = line_search(own, PATCH, Gate.instance(), calibration=data, limit=Gate.tolerance(3))
    assert [point.polished for point in found.path if point.strength == found.chosen] == [True]
    assert found.selection == Selection(LIMIT_STATES, True)


class Window(Line):
    """Samples whose first input is below 0 break near a strength, and are right again beyond it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = self.weight[1]
        near = torch.where(x[:, :1] > 0, t + x[:, 1:], 0.07 - (t + x[:, 1:]).abs())
        return torch.cat([torch.zeros(len(x), 1), near], 1)


def windowed(**changes: Any) -> Problem:
    model, sources = Window().eval(), (WRONG, SAFE)
    evaluator = Evaluator(model)
    before = evaluator.run(sources, AllFailures())
    return replace(problem(WRONG, SAFE, **changes), evaluator=evaluator, before=before, passed=before.passed)


def test_a_strength_beyond_a_weaker_one_that_breaks_more_is_none_that_a_walk_accepts() -> None:
    near = TensorSource(torch.tensor([[-1.0, -0.3], [1.0, -9.0]]), torch.tensor([0, 0]), split="near")
    limit = {"limit": Gate.instance()}
    own = windowed()
    found = line_search(own, PATCH, Gate.instance(), calibration=aside(own, near), **limit)
    # At 0.3, between two strengths of the path, a sample breaks that is right at both.
    assert (found.chosen, found.selection) == (1.2, Selection(LIMIT_STATES, True))
    far = TensorSource(torch.tensor([[-1.0, -9.0], [1.0, -9.0]]), torch.tensor([0, 0]), split="far")
    found = line_search(own, PATCH, Gate.instance(), calibration=aside(own, far), **limit)
    assert (found.chosen, found.selection) == (1.2, Selection(LIMIT_STATES, True, 0))


def test_without_time_for_a_walk_nothing_is_said_of_one() -> None:
    own = problem(WRONG, SAFE, clock=StageTimer(max_time=0))
    found = line_search(own, PATCH, Gate.instance(), calibration=aside(own, line(2.0, label=0)), limit=Gate.instance())
    assert (found.chosen, found.selection) == (1.0, Selection(LIMIT_STATES, True))


def test_the_limits_fail_no_more_often_than_they_say() -> None:
    draws = 150
    most = next(k for k in range(draws) if binomial_cdf(k, draws, 1 - CONFIDENCE) >= 0.999)
    found = trials(draws)
    assert len(found) == 6
    assert all(trial.missed <= most for trial in found)
    assert sum(trial.taken for trial in found) > 4 * draws


@dataclass(frozen=True)
class Given:
    """A method that knows the answer."""

    state: State

    def __call__(self, problem: Problem) -> Solution:
        return Solution(problem.propose("given", self.state))


def calibration(n: int = 300, shift: float = 0.0) -> TensorSource:
    return TensorSource(*blobs(n, shift, seed=9), split="calibration")


def repaired(data: Sequence[TensorSource], **given: Any) -> Outcome:
    model = trained()
    patch = {"2.bias": model[2].bias.detach() + torch.tensor([1.0, 0.0, 0.0])}
    how = quick(**{"method": Given(patch), "gate": Gate.accuracy(), **given})
    return repair_module(model, known(), how, calibration=data)


def test_a_report_says_what_the_calibration_data_say() -> None:
    report = repaired([calibration()], strength=1.0).report
    split, bounds = report.splits[-1], report.bounds
    assert bounds is not None
    assert (bounds.broken, bounds.n, bounds.states) == (split.broken, split.passed, 1)
    assert bounds.upper == pytest.approx(upper_limit(split.broken, split.passed), abs=1e-12)
    again = RepairReport.from_json(report.to_json())
    assert again == report
    page = report.to_markdown()
    assert f"broken {bounds.broken} of {bounds.n}" in page
    assert "with 95 % confidence at most" in page


def test_a_limit_that_chose_the_strength_is_what_is_said() -> None:
    report = repaired([calibration()], limit="tolerance:5%", confidence=0.9).report
    bounds = report.bounds
    assert bounds is not None
    assert bounds.allowed == int(0.05 * bounds.n)
    assert bounds.upper == pytest.approx(limit_at_level(bounds.allowed, bounds.n, 0.08), abs=1e-12)
    assert f"the limit of {bounds.allowed} broken, up to which each strength was accepted" in report.to_markdown()


def test_without_an_accepted_repair_or_calibration_data_nothing_is_said() -> None:
    assert repaired([], strength=1.0).report.bounds is None
    much = {"2.bias": trained()[2].bias.detach() + torch.tensor([9.0, 0.0, 0.0])}
    refused = repaired([calibration()], strength=1.0, gate=Gate.instance(), method=Given(much)).report
    assert refused.status == "refused"
    assert refused.bounds is None


@dataclass(frozen=True)
class Never:
    """A method that must not be reached."""

    def __call__(self, problem: Problem) -> Solution:
        raise AssertionError("the search has begun")


def test_slices_that_do_not_fit_are_refused_before_the_search() -> None:
    with pytest.raises(ConfigurationError, match="`slices` returned Tensor"):
        repaired([calibration()], method=Never(), slices=lambda batch: batch[0])


def test_strengths_of_a_walk_are_those_of_the_path_where_both_have_them() -> None:
    assert {1.0, 1.15, 0.6, 0.8, 0.4, 0.2, 1.3} <= set(LIMIT_STRENGTHS)
