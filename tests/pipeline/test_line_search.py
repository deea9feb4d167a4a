"""Strength by hand: samples on a line, each of which changes its class where the strength crosses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_lines import PATCH, Line, aside, line, problem
from toy_repairs import known, quick, trained

from lightning_nrl import ConfigurationError, Gate, TensorSource, repair_module
from lightning_nrl._utils.state import State, snapshot
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.targets import AllFailures
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.methods import Problem, Solution
from lightning_nrl.pipeline import Outcome
from lightning_nrl.pipeline.strength import PatchPath, choose_strength, line_search
from lightning_nrl.report import StrengthPoint

WRONG = line(0.1, 0.3, 0.5, 0.95, 1.1, split="wrong")
RIGHT = line(0.9, 1.2, 1.25, 9, split="right", label=0)
SAFE = line(1.2, 9, split="right", label=0)


def test_the_path_by_hand() -> None:
    own = problem(WRONG, RIGHT)
    before = snapshot(own.model)
    path = PatchPath(own, PATCH, calibration=aside(own, line(0.55, 0.7, label=0))).count((1.0, 0.2, 0.6))
    assert path == (
        StrengthPoint(0.2, 1, FlipCounts(4, 0, 1, 4), FlipCounts(2, 0, 0, 0)),
        StrengthPoint(0.6, 3, FlipCounts(4, 0, 3, 2), FlipCounts(1, 1, 0, 0)),
        StrengthPoint(1.0, 4, FlipCounts(3, 1, 4, 1), FlipCounts(0, 2, 0, 0)),
    )
    assert torch.equal(own.model.weight, before["weight"])


def strengths(path: Sequence[StrengthPoint]) -> list[float]:
    return [point.strength for point in path]


def test_beyond_the_patch_it_stops_at_the_first_that_breaks_more_than_the_gate_allows() -> None:
    both = (1.0, 1.15, 1.3)
    assert strengths(PatchPath(problem(WRONG, RIGHT), PATCH).count(both)) == [1.0, 1.15]
    assert strengths(PatchPath(problem(WRONG, SAFE), PATCH).count(both)) == [1.0, 1.15, 1.3]
    two = Gate.tolerance(3)
    assert strengths(PatchPath(problem(WRONG, RIGHT), PATCH, gate=two).count(both)) == [1.0, 1.15, 1.3]


@pytest.mark.parametrize(("left", "counted"), [(0.0, 1), (1e6, 7)])
def test_where_time_is_short_fewer_points_are_counted(left: float, counted: int) -> None:
    clock = StageTimer(max_time=left)
    clock.seconds["collect"] = 1.0
    assert len(PatchPath(problem(WRONG, SAFE, clock=clock), PATCH).count()) == counted


def test_points_that_decide_nothing_take_a_tenth_of_the_time() -> None:
    now = [1000.0]

    def search(elapsed: float, samples: int = 6, calibration: TensorSource | None = None) -> int:
        now[0] = 1000.0
        own = problem(WRONG, SAFE, clock=StageTimer(now=lambda: now[0]))
        patched = own.evaluate(PATCH)
        data = None if calibration is None else aside(own, calibration)
        own.model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 0.5))  # one a split, two splits
        now[0] = 1000.0 + elapsed
        gate = Gate.instance()
        found = line_search(own, PATCH, gate, calibration=data, after=patched, full_curve_samples=samples)
        return len(found.path)

    count = [search(elapsed) for elapsed in (0, 21, 41, 1000)]
    assert count == [1, 4, 6, 7]  # 1 is known; 2.1 seconds are for three more, 4.1 for five, 100 for all
    assert search(0, calibration=line(0.7, 9, label=0)) == 7  # no time at all
    assert search(0, samples=7) == 7


@pytest.mark.parametrize("fixed", [0.3, 1.15, 1.2])
def test_a_strength_that_was_asked_for_is_counted_even_without_time(fixed: float) -> None:
    own = problem(WRONG, SAFE, clock=StageTimer(now=lambda: 1000.0))
    found = line_search(own, PATCH, Gate.instance(), fixed=fixed, full_curve_samples=0)
    assert (found.chosen, strengths(found.path)) == (fixed, [fixed])


def test_what_is_known_of_the_patch_is_not_counted_again() -> None:
    own, runs = problem(WRONG, RIGHT), []
    after = own.evaluate(PATCH)
    own.model.register_forward_hook(lambda *_: runs.append(1))
    assert PatchPath(own, PATCH).count((1.0,), after=after) == PatchPath(own, PATCH).count((1.0,))
    assert len(runs) == 2  # of the second of these, one a split


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


def test_without_a_count_of_the_patch_itself_it_is_taken() -> None:
    assert choose_strength([]) == 1.0


@pytest.mark.parametrize(
    ("limit", "chosen"),
    [("tolerance:0", 0.55), ("tolerance:1", 0.7), ("tolerance:50%", 0.7), ("tolerance:3", 0.95), ("accuracy", 0.55)],
)
def test_the_strongest_within_a_limit_is_found_on_a_finer_grid(limit: str, chosen: float) -> None:
    own = problem(WRONG, RIGHT)
    data = aside(own, line(0.57, 0.72, 9, label=0))
    found = line_search(own, PATCH, Gate.instance(), calibration=data, limit=Gate.parse(limit))
    assert found.chosen == chosen
    assert chosen in strengths(found.path)
    assert strengths(found.path) == sorted(set(strengths(found.path)))


def test_a_point_on_the_way_that_breaks_something_is_polished() -> None:
    # Half way to 2 the second sample breaks, which at the end is right again; the first one is repaired at 0.4.
    class Bent(Line):
        def forward(self, x: Tensor) -> Tensor:
            t = self.weight[1]
            return torch.cat([torch.zeros(len(x), 1), torch.where(x[:, :1] > 0, t - 0.4, 0.75 - (t - 1).abs())], 1)

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
    assert line_search(own, {"weight": torch.tensor([[0.0], [2.0]])}, Gate.accuracy(), fixed=0.6).state[
        "weight"
    ].tolist() == [[0.0], [pytest.approx(1.2)]]


def test_no_strength_within_a_limit_is_none() -> None:
    own = problem(WRONG, SAFE)
    data = aside(own, line(0.01, label=0))
    assert line_search(own, PATCH, Gate.instance(), calibration=data, limit=Gate.instance()).chosen is None


def test_without_time_a_strength_that_was_counted_can_be_taken() -> None:
    clock = StageTimer(max_time=0)
    own = problem(WRONG, SAFE, clock=clock)
    data = aside(own, line(2.0, label=0))
    found = line_search(own, PATCH, Gate.instance(), calibration=data, limit=Gate.instance())
    assert strengths(found.path) == [1.0]
    assert found.chosen == 1.0
    assert torch.equal(found.state["weight"], PATCH["weight"])


@dataclass(frozen=True)
class Given:
    """A method that knows the answer."""

    state: State

    def __call__(self, problem: Problem) -> Solution:
        return Solution(problem.propose("given", self.state))


def repaired(calibration: Sequence[TensorSource] = (), **settings: Any) -> tuple[nn.Module, Outcome]:
    """The toy with a patch that is known: 1 is added to the bias of the first class."""
    model = trained()
    patch = {"2.bias": model[2].bias.detach() + torch.tensor([1.0, 0.0, 0.0])}
    how = quick(method=Given(patch), gate=Gate.accuracy(), **settings)
    return model, repair_module(model, known(), how, calibration=calibration)


def test_a_fixed_strength_is_what_is_written() -> None:
    model, outcome = repaired(strength=0.5)
    bias = model[2].bias.detach().clone()
    assert outcome.write(model)
    torch.testing.assert_close(model[2].bias.detach() - bias, torch.tensor([0.5, 0.0, 0.0]))
    assert outcome.report.chosen_strength == 0.5
    assert strengths(outcome.report.strength)[:3] == [0.2, 0.4, 0.5]


def test_a_strength_that_leaves_nothing_of_the_change_is_a_report() -> None:
    model, outcome = repaired(strength=1e-12)
    assert outcome.report.status == "not repaired"
    assert outcome.report.reason == "at strength 1e-12 nothing is left of the change."
    assert strengths(outcome.report.strength)[0] == 1e-12
    assert not outcome.write(model)


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
    model, outcome = repaired([TensorSource(everywhere, answers, split="calibration")], limit="instance")
    assert outcome.report.status == "not repaired"
    assert outcome.report.reason == "no strength keeps within the limit (instance)."
    assert outcome.report.strength
    assert not outcome.write(model)


def test_a_limit_needs_data() -> None:
    with pytest.raises(ConfigurationError, match="`limit='instance'` needs calibration data"):
        repaired(limit="instance")
