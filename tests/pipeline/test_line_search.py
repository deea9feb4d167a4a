"""Strength by hand, on a line where each sample changes its class, and what is then said of
calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from benchmarks.strengths import CONFIDENCE, trials
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_lines import PATCH, Line, aside, line, problem
from toy_repairs import blobs, known, quick, trained

from lightning_nrl import ConfigurationError, Gate, TensorSource, repair_module
from lightning_nrl._utils.state import State, snapshot
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.targets import AllFailures
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.methods import Method, Problem, Solution
from lightning_nrl.pipeline import Outcome
from lightning_nrl.pipeline.strength import LIMIT_STATES, PatchPath, line_search
from lightning_nrl.records import StrengthPoint
from lightning_nrl.records.stats import (
    Selection,
    binomial_cdf,
    limit_after,
    limit_at_level,
    upper_limit,
)
from lightning_nrl.report import RepairReport

WRONG = line(0.1, 0.3, 0.5, 0.95, 1.1, split="wrong")
RIGHT = line(0.9, 1.2, 1.25, 9, split="right", label=0)
SAFE = line(1.2, 9, split="right", label=0)


def test_the_path_by_hand() -> None:
    own = problem(WRONG, RIGHT)
    before = snapshot(own.model)
    path = PatchPath(own, PATCH, calibration=aside(own, line(0.55, 0.7, label=0))).count(
        (1.0, 0.2, 0.6)
    )
    assert path == (
        StrengthPoint(0.2, 1, FlipCounts(4, 0, 1, 4), FlipCounts(2, 0, 0, 0)),
        StrengthPoint(0.6, 3, FlipCounts(4, 0, 3, 2), FlipCounts(1, 1, 0, 0)),
        StrengthPoint(1.0, 4, FlipCounts(3, 1, 4, 1), FlipCounts(0, 2, 0, 0)),
    )
    assert torch.equal(own.model.weight, before["weight"])


def strengths(path: Sequence[StrengthPoint]) -> list[float]:
    return [point.strength for point in path]


@pytest.mark.parametrize(
    ("known_right", "calibration", "chosen"),
    [
        (SAFE, None, 1.0),
        (line(1.12, split="right", label=0), None, 1.0),
        (SAFE, line(1.12, label=0), 1.0),
        (SAFE, line(0.7, 9, label=0), 1.15),  # 1.1 is crossed at 1.15, nothing at 1.3
    ],
)
def test_a_step_beyond_is_taken_only_if_it_is_free(
    known_right: TensorSource, calibration: TensorSource | None, chosen: float
) -> None:
    own = problem(WRONG, known_right)
    data = None if calibration is None else aside(own, calibration)
    assert line_search(own, PATCH, Gate.instance(), calibration=data).chosen == chosen


@pytest.mark.parametrize(
    ("limit", "chosen"),
    [
        ("tolerance:0", 0.55),
        ("tolerance:1", 0.7),
        ("tolerance:50%", 0.7),
        ("tolerance:3", 0.95),
        ("accuracy", 0.55),
    ],
)
def test_the_strongest_within_a_limit_is_found_on_a_finer_grid(limit: str, chosen: float) -> None:
    own = problem(WRONG, RIGHT)
    data = aside(own, line(0.57, 0.72, 9, label=0))
    found = line_search(own, PATCH, Gate.instance(), calibration=data, limit=Gate.parse(limit))
    assert found.chosen == chosen
    assert chosen in strengths(found.path)
    assert strengths(found.path) == sorted(set(strengths(found.path)))


def test_a_point_on_the_way_that_breaks_something_is_polished() -> None:
    # Half way to 2 the second sample breaks, which at the end is right again; the first one is
    # repaired at 0.4.
    class Bent(Line):
        def forward(self, x: Tensor) -> Tensor:
            t = self.weight[1]
            return torch.cat(
                [torch.zeros(len(x), 1), torch.where(x[:, :1] > 0, t - 0.4, 0.75 - (t - 1).abs())],
                1,
            )

    inputs = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    source = TensorSource(inputs, torch.tensor([1, 0]), split="bent", passed=True, failed=True)
    own = problem(source)
    evaluator = Evaluator(Bent().eval())
    before = evaluator.run([source], AllFailures())
    assert before.passed.tolist() == [False, True]
    own = replace(own, evaluator=evaluator, before=before, passed=before.passed)
    found = line_search(own, {"weight": torch.tensor([[0.0], [2.0]])}, Gate.instance(), fixed=0.6)
    (point,) = (point for point in found.path if point.strength == 0.6)
    assert point.polished
    assert point.known.broken == 0
    after = own.evaluate(found.state)
    assert int(after.passed.sum()) == point.known.repaired + point.known.kept
    assert strengths(found.path) == sorted({0.6, *strengths(found.path)})
    assert line_search(
        own, {"weight": torch.tensor([[0.0], [2.0]])}, Gate.accuracy(), fixed=0.6
    ).state["weight"].tolist() == [[0.0], [pytest.approx(1.2)]]


@dataclass(frozen=True)
class Given(Method):
    """A method that knows the answer."""

    state: State

    def __call__(self, problem: Problem) -> Solution:
        return Solution(problem.propose("given", self.state))


def repaired(
    calibration: Sequence[TensorSource] = (), **settings: Any
) -> tuple[nn.Module, Outcome]:
    """The toy with a patch that is known: 1 is added to the bias of the first class."""
    model = trained()
    patch = {"2.bias": model[2].bias.detach() + torch.tensor([1.0, 0.0, 0.0])}
    how = quick(**{"method": Given(patch), "gate": Gate.accuracy(), **settings})
    return model, repair_module(model, known(), how, calibration=calibration)


def test_a_fixed_strength_is_what_is_written() -> None:
    model, outcome = repaired(strength=0.5)
    bias = model[2].bias.detach().clone()
    assert outcome.write(model)
    torch.testing.assert_close(model[2].bias.detach() - bias, torch.tensor([0.5, 0.0, 0.0]))
    assert outcome.report.chosen_strength == 0.5
    assert strengths(outcome.report.strength)[:3] == [0.2, 0.4, 0.5]


@pytest.mark.parametrize("limit", ["tolerance:100%", "tolerance:2%", "instance"])
def test_calibration_data_are_counted_before_and_after(limit: str) -> None:
    data = [replace(source, split="calibration") for source in known(5)[1:]]
    _, outcome = repaired(data, limit=limit)
    split, chosen = outcome.report.splits[-1], outcome.report.chosen_strength
    assert (split.split, split.role, split.n) == ("calibration", "calibration", 60)
    (point,) = (point for point in outcome.report.strength if point.strength == chosen)
    assert point.calibration == FlipCounts(split.kept, split.broken, split.repaired, split.failing)
    assert split.broken <= Gate.parse(limit).allowed(point.calibration)
    stronger = [point for point in outcome.report.strength if point.strength > chosen]
    assert all(
        point.calibration.broken > Gate.parse(limit).allowed(point.calibration)
        or point.known.broken > point.known.repaired
        for point in stronger
    )


def test_where_no_strength_keeps_within_the_limit_nothing_is_changed() -> None:
    everywhere = 3 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    answers = trained()(everywhere).argmax(1)
    model, outcome = repaired(
        [TensorSource(everywhere, answers, split="calibration")], limit="instance"
    )
    assert outcome.report.status == "not repaired"
    assert outcome.report.reason == "no strength is within the limit (instance)."
    assert outcome.report.strength
    assert not outcome.write(model)


def test_a_limit_needs_data() -> None:
    with pytest.raises(ConfigurationError, match="`limit='instance'` needs calibration data"):
        repaired(limit="instance")


def test_the_limit_by_hand() -> None:
    assert LIMIT_STATES == 26 + 19
    assert limit_after(4, 908, Selection(), 0.95) == pytest.approx(upper_limit(4, 908), abs=1e-12)
    assert limit_after(4, 908, Selection(3), 0.95) == pytest.approx(
        limit_at_level(4, 908, 0.05 / 3), abs=1e-12
    )
    assert limit_after(4, 908, Selection(45, True, 9), 0.95) == pytest.approx(
        limit_at_level(9, 908, 0.04), abs=1e-12
    )
    assert limit_after(4, 908, Selection(45, True), 0.95) == pytest.approx(
        limit_at_level(4, 908, 0.01 / 45), abs=1e-12
    )
    assert limit_after(4, 908, Selection(45), 0.95) == pytest.approx(
        limit_at_level(4, 908, 0.05 / 45), abs=1e-12
    )
    assert limit_after(0, 0, Selection(45, True, 3), 0.95) == 1.0


@given(st.integers(50, 400), st.integers(0, 5), st.lists(st.integers(0, 9), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_walk_up_to_a_count_is_a_fixed_sequence_test_of_its_limit(
    n: int, allowed: int, counts: list[int]
) -> None:
    limit = limit_after(0, n, Selection(LIMIT_STATES, True, allowed), 0.95)
    end = next((i for i, k in enumerate(counts) if k > allowed), len(counts))
    accepted = [binomial_cdf(k, n, limit) <= 0.04 * (1 + 1e-9) for k in counts]
    assert (*accepted, False).index(False) == end


@pytest.mark.parametrize(
    ("how", "chosen", "selection"),
    [
        ({"fixed": 0.6}, 0.6, Selection()),
        # 1.1 is repaired from 1.15 on, and at 1.3 something known breaks: the data had a say in one
        # step.
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
    data = aside(
        own, *([line(*crossings, label=0)]), *([line(9.0, split="wrong too")] if how else [])
    )
    found = line_search(own, PATCH, Gate.instance(), calibration=data, **how)
    assert (found.chosen, found.selection) == (chosen, selection)


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
    return replace(
        problem(WRONG, SAFE, **changes), evaluator=evaluator, before=before, passed=before.passed
    )


def test_a_strength_beyond_a_weaker_one_that_breaks_more_is_none_that_a_walk_accepts() -> None:
    near = TensorSource(
        torch.tensor([[-1.0, -0.3], [1.0, -9.0]]), torch.tensor([0, 0]), split="near"
    )
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
    found = line_search(
        own,
        PATCH,
        Gate.instance(),
        calibration=aside(own, line(2.0, label=0)),
        limit=Gate.instance(),
    )
    assert (found.chosen, found.selection) == (1.0, Selection(LIMIT_STATES, True))


def test_the_limits_fail_no_more_often_than_they_say() -> None:
    draws = 150
    most = next(k for k in range(draws) if binomial_cdf(k, draws, 1 - CONFIDENCE) >= 0.999)
    found = trials(draws)
    assert len(found) == 6
    assert all(trial.missed <= most for trial in found)
    assert sum(trial.taken for trial in found) > 4 * draws


def calibration(n: int = 300, shift: float = 0.0) -> TensorSource:
    return TensorSource(*blobs(n, shift, seed=9), split="calibration")


def test_a_report_says_what_the_calibration_data_say() -> None:
    _, outcome = repaired([calibration()], strength=1.0)
    report = outcome.report
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
    _, outcome = repaired([calibration()], limit="tolerance:5%", confidence=0.9)
    report = outcome.report
    bounds = report.bounds
    assert bounds is not None
    assert bounds.allowed == int(0.05 * bounds.n)
    assert bounds.upper == pytest.approx(limit_at_level(bounds.allowed, bounds.n, 0.08), abs=1e-12)
    assert (
        f"the limit for {bounds.allowed} broken, since strengths that break more"
        in report.to_markdown()
    )


def test_without_an_accepted_repair_or_calibration_data_nothing_is_said() -> None:
    assert repaired([], strength=1.0)[1].report.bounds is None
    much = {"2.bias": trained()[2].bias.detach() + torch.tensor([9.0, 0.0, 0.0])}
    refused = repaired([calibration()], strength=1.0, gate=Gate.instance(), method=Given(much))[
        1
    ].report
    assert refused.status == "refused"
    assert refused.bounds is None
