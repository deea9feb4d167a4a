"""The choice of a strength, on a line where each sample changes its class at a known strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from benchmarks.strengths import CONFIDENCE, trials
from toy_lines import PATCH, Line, aside, line, problem
from toy_problems import StageTimer, State
from toy_repairs import blobs, known, quick, trained

from lightning_nrl import ConfigurationError, Gate, TensorSource, repair_module
from lightning_nrl.data.targets import AllFailures
from lightning_nrl.evaluation import Evaluator, FlipCounts
from lightning_nrl.evaluation.stats import Selection, binomial_cdf, limit_after, limit_at_level
from lightning_nrl.methods import Method, Problem, Solution
from lightning_nrl.pipeline import Outcome
from lightning_nrl.pipeline.strength import LIMIT_STATES, LineSearchResult, line_search

WRONG = line(0.1, 0.3, 0.5, 0.95, 1.1, split="wrong")
RIGHT = line(0.9, 1.2, 1.25, 9, split="right", label=0)
SAFE = line(1.2, 9, split="right", label=0)


def search(right: TensorSource, *calibration: TensorSource, **arguments: Any) -> LineSearchResult:
    line_problem = problem(WRONG, right)
    data = aside(line_problem, *calibration) if calibration else None
    return line_search(line_problem, PATCH, Gate.instance(), calibration=data, **arguments)


@pytest.mark.parametrize(
    ("right", "calibration", "chosen", "selection"),
    [
        (SAFE, (), 1.0, Selection()),
        (SAFE, (line(1.12, label=0),), 1.0, Selection(2)),
        # 1.1 is repaired from 1.15 on, and a known sample breaks at 1.3.
        (SAFE, (line(0.7, 9, label=0),), 1.15, Selection(2)),
        (line(1.12, split="right", label=0), (line(9, label=0),), 1.0, Selection()),
    ],
)
def test_a_strength_above_1_is_taken_only_if_it_breaks_nothing(
    right, calibration, chosen, selection
):
    result = search(right, *calibration)
    assert (result.chosen, result.selection) == (chosen, selection)


@pytest.mark.parametrize(
    ("limit", "chosen", "selection"),
    [
        ("tolerance:0", 0.55, Selection(LIMIT_STATES, True, 0)),
        ("tolerance:1", 0.7, Selection(LIMIT_STATES, True, 1)),
        ("tolerance:50%", 0.7, Selection(LIMIT_STATES, True, 1)),
        # All samples may break.
        ("tolerance:3", 0.95, Selection(LIMIT_STATES)),
        # Depends on how many samples are repaired.
        ("accuracy", 0.55, Selection(LIMIT_STATES)),
    ],
)
def test_the_greatest_strength_within_a_limit_is_found_on_a_finer_grid(limit, chosen, selection):
    calibration = line(0.57, 0.72, 9, label=0), line(9.0, split="wrong too")
    result = search(RIGHT, *calibration, limit=Gate.parse(limit))
    assert (result.chosen, result.selection) == (chosen, selection)
    strengths = [point.strength for point in result.path]
    assert chosen in strengths
    assert strengths == sorted(set(strengths))


def test_a_polished_strength_is_not_accepted_in_order():
    result = search(RIGHT, line(0.57, 0.72, 9, 9.5, label=0), limit=Gate.tolerance(3))
    assert [point.polished for point in result.path if point.strength == result.chosen] == [True]
    assert result.selection == Selection(LIMIT_STATES, True)


def test_without_time_to_count_weaker_strengths_none_is_accepted_in_order():
    late = problem(WRONG, SAFE, clock=StageTimer(max_time=0))
    data = aside(late, line(2.0, label=0))
    result = line_search(late, PATCH, Gate.instance(), calibration=data, limit=Gate.instance())
    assert (result.chosen, result.selection) == (1.0, Selection(LIMIT_STATES, True))


class Bump(Line):
    """Samples with a first input below 0 are class 1 only near one strength."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = self.weight[1] + x[:, 1:]
        return torch.cat([torch.zeros(len(x), 1), torch.where(x[:, :1] > 0, t, 0.07 - t.abs())], 1)


def bump(sign: float, place: float, split: str) -> TensorSource:
    inputs = torch.tensor([[sign, -place]])
    return TensorSource(inputs, torch.tensor([0]), split=split, passed=True)


def on_bumps(*sources: TensorSource) -> Problem:
    evaluator = Evaluator(Bump().eval())
    before = evaluator.run(sources, AllFailures())
    return replace(problem(*sources), evaluator=evaluator, before=before, passed=before.passed)


def test_a_strength_above_a_weaker_one_that_breaks_more_is_not_accepted_in_order():
    bumps = on_bumps(WRONG, SAFE)
    # Between two strengths of the path, at 0.3, a sample breaks that is right at both.
    for place, allowed in ((0.3, None), (9.0, 0)):
        data = aside(bumps, bump(-1.0, place, "near"))
        result = line_search(bumps, PATCH, Gate.instance(), calibration=data, limit=Gate.instance())
        assert (result.chosen, result.selection) == (1.2, Selection(LIMIT_STATES, True, allowed))


def test_a_known_sample_that_breaks_at_a_lower_strength_is_polished():
    bumps = on_bumps(WRONG, bump(-1.0, 0.6, "right"))
    result = line_search(bumps, PATCH, Gate.instance(), fixed=0.6)
    (point,) = (point for point in result.path if point.strength == 0.6)
    assert (point.polished, point.known.broken) == (True, 0)
    after = bumps.evaluate(result.state)
    assert int(after.passed.sum()) == point.known.repaired + point.known.kept
    unpolished = line_search(bumps, PATCH, Gate.accuracy(), fixed=0.6)
    assert unpolished.state["weight"][1].item() == pytest.approx(0.6)


@dataclass(frozen=True)
class KnownAnswer(Method):
    state: State

    def __call__(self, problem: Problem) -> Solution:
        return Solution(problem.propose("known answer", self.state))


def repaired(calibration: Sequence[TensorSource] = (), **settings: Any) -> Outcome:
    """A repair whose method adds 1 to the bias of the first class."""
    model = trained()
    bias = model[2].bias.detach() + torch.tensor([1.0, 0.0, 0.0])
    options = {"method": KnownAnswer({"2.bias": bias}), "gate": Gate.accuracy(), **settings}
    return repair_module(model, known(), quick(**options), calibration=calibration)


def test_a_fixed_strength_is_what_is_written():
    outcome = repaired(strength=0.5)
    bias = outcome.parameters["2.bias"] - trained()[2].bias.detach()
    torch.testing.assert_close(bias, torch.tensor([0.5, 0.0, 0.0]))
    assert outcome.report.chosen_strength == 0.5
    assert outcome.report.bounds is None


def calibration() -> list[TensorSource]:
    return [TensorSource(*blobs(300, 0.0, seed=9), split="calibration")]


@pytest.mark.parametrize("limit", ["tolerance:100%", "tolerance:5%", "instance"])
def test_a_limit_holds_on_calibration_data(limit):
    report = repaired(calibration(), limit=limit, confidence=0.9).report
    split, bounds, gate = report.splits[-1], report.bounds, Gate.parse(limit)
    assert (split.split, split.role, split.n) == ("calibration", "calibration", 300)
    for point in report.strength:
        if point.strength == report.chosen_strength:
            counts = (split.kept, split.broken, split.repaired, split.failing)
            assert point.calibration == FlipCounts(*counts)
    assert split.broken <= gate.allowed(split.counts)
    assert (bounds.broken, bounds.n, bounds.confidence) == (split.broken, split.passed, 0.9)
    if bounds.allowed is not None:
        upper = limit_at_level(gate.allowed(split.counts), bounds.n, 0.1 * 0.8)
        assert bounds.upper == pytest.approx(upper, abs=1e-12)
        assert f"the limit for {bounds.allowed} broken" in report.to_markdown()


def test_calibration_data_that_choose_nothing_give_a_plain_limit():
    report = repaired(calibration(), strength=1.0).report
    assert report.bounds.upper == limit_at_level(report.bounds.broken, report.bounds.n, 1 - 0.95)
    assert f"broken {report.bounds.broken} of {report.bounds.n}" in report.to_markdown()


def test_refused_weights_have_no_bounds():
    bias = trained()[2].bias.detach() + torch.tensor([9.0, 0.0, 0.0])
    method = KnownAnswer({"2.bias": bias})
    report = repaired(calibration(), strength=1.0, gate=Gate.instance(), method=method).report
    assert (report.status, report.bounds) == ("refused", None)


def test_without_a_strength_within_the_limit_nothing_changes():
    inputs = 3 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    everywhere = TensorSource(inputs, trained()(inputs).argmax(1), split="calibration")
    outcome = repaired([everywhere], limit="instance")
    assert outcome.report.status == "not repaired"
    assert outcome.report.reason == "no strength is within the limit (instance)."
    assert outcome.parameters is None


def test_a_limit_needs_calibration_data():
    with pytest.raises(ConfigurationError, match="`limit='instance'` needs calibration data"):
        repaired(limit="instance")


@pytest.mark.parametrize(
    ("selection", "broken", "level"),
    [
        (Selection(), 4, 0.05),
        (Selection(3), 4, 0.05 / 3),
        (Selection(45, True, 9), 9, 0.04),
        (Selection(45, True), 4, 0.01 / 45),
    ],
)
def test_the_limit_depends_on_the_choice(selection, broken, level):
    limit = limit_after(4, 908, selection, 0.95)
    assert limit == pytest.approx(limit_at_level(broken, 908, level), abs=1e-12)


def test_limits_fail_no_more_often_than_they_say():
    draws = 150
    most = next(k for k in range(draws) if binomial_cdf(k, draws, 1 - CONFIDENCE) >= 0.999)
    studies = trials(draws)
    assert len(studies) == 6
    assert max(study.missed for study in studies) <= most
    assert sum(study.taken for study in studies) > 4 * draws
