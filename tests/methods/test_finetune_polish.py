"""Fit and polish in their order: what each is given of the time, and what is said where there is nothing to give."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_problems import (
    FakeTraining,
    Marginless,
    barely,
    broken,
    checked,
    left_alone,
    make_problem,
    normed,
    on_a_line,
    retrained,
    same,
    threshold,
    together,
)
from toy_repairs import known, trained

from lightning_nrl import BoundOptions, ConfigurationError, Settings, repair_module
from lightning_nrl._utils.state import State, snapshot
from lightning_nrl._utils.timing import Deadline, StageTimer
from lightning_nrl.methods import FineTunePolish, Linearized, Polish, Problem, Solution
from lightning_nrl.methods import finetune_polish as module
from lightning_nrl.methods._solvers import distill as fit_module
from lightning_nrl.methods._solvers import polish as polish_module


@pytest.fixture(autouse=True)
def few_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "VISITS_PER_SAMPLE", 12)
    monkeypatch.setattr(fit_module, "DISTILL_RATE", 0.01)
    monkeypatch.setattr(module, "FIT_STRENGTH", 1.0)


def test_training_goes_on_and_is_polished() -> None:
    model = trained(normed).eval()
    training = FakeTraining(barely(make_problem(model, known()), retrained(model)))
    problem = make_problem(model, known(), training=training, seed=7)
    with left_alone(model):
        solution = checked(problem, FineTunePolish()(problem))
    (call,) = training.calls
    assert call == {"seconds": math.inf, "seed": 7} | dict.fromkeys(("start", "weight", "epochs", "rate"))
    (fitted,) = solution.others
    assert same(fitted.state, training.state)
    assert fitted.broken > 0
    first, second = solution.steps
    assert (first.name, first.note, first.broken, first.repaired) == (
        "fit",
        "continued training",
        fitted.broken,
        fitted.repaired,
    )
    assert (second.name, second.broken, second.repaired) == ("polish", 0, solution.proposal.repaired)
    assert second.note.partition(" ")[2] in ("round", "rounds")
    assert solution.proposal.name == "polish"
    assert torch.equal(solution.proposal.state["1.running_mean"], training.state["1.running_mean"])
    assert list(problem.clock.seconds) == ["fit", "polish"]


def test_a_part_of_what_was_fitted_is_polished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIT_STRENGTH", 0.5)
    solution = FineTunePolish()(on_a_line(training=FakeTraining(threshold(0.55))))
    assert solution.steps[0].broken == 0
    assert solution.proposal is not None
    torch.testing.assert_close(solution.proposal.state["weight"], threshold(0.65)["weight"])
    assert solution.proposal.repaired == 1


def test_how_far_back_a_polish_had_to_go_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained().eval()
    problem = make_problem(model, known(), training=FakeTraining(retrained(model)), clock=StageTimer(max_time=60))
    polish = polish_module.polish
    monkeypatch.setattr(
        polish_module, "polish", lambda *args, **rest: polish(*args, **{**rest, "deadline": Deadline(0.0)})
    )
    solution = checked(problem, FineTunePolish()(problem))
    assert solution.steps[1].note.startswith("1 round, then back to ")
    assert solution.steps[1].note.endswith("% of the way")


def test_where_training_has_no_time_there_are_distilled_steps() -> None:
    training = FakeTraining(None)
    problem = make_problem(trained(), known(), training=training)
    solution = checked(problem, FineTunePolish()(problem))
    assert len(training.calls) == 1
    assert solution.steps[0].note == "distilled steps"
    assert set(solution.others[0].state) == set(problem.scope)


def test_a_layer_is_not_trained() -> None:
    training = FakeTraining({})
    problem = make_problem(trained(), known(), layer="2", training=training)
    assert not problem.whole
    solution = checked(problem, FineTunePolish()(problem))
    assert training.calls == []
    assert solution.steps[0].note == "distilled steps"
    assert set(solution.proposal.state) == {"2.weight", "2.bias"}


def test_where_nobody_knows_how_it_was_trained_there_are_distilled_steps() -> None:
    problem = make_problem(trained(), known())
    assert checked(problem, FineTunePolish()(problem)).steps[0].note == "distilled steps"


@pytest.mark.parametrize(("share", "expected"), [(1.0, 85.0), (0.5, 35.0)])
def test_it_takes_its_share_of_the_time(share: float, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = trained().eval(), {}
    training = FakeTraining(barely(make_problem(model, known()), retrained(model)))
    problem = make_problem(model, known(), training=training, clock=StageTimer(max_time=100))
    problem.clock.seconds["collect"] = 1.0
    polish = polish_module.polish

    def listen(*args: Any, deadline: Deadline, **rest: Any) -> Any:
        given["polish"] = deadline.seconds_left
        return polish(*args, deadline=deadline, **rest)

    monkeypatch.setattr(polish_module, "polish", listen)
    checked(problem, FineTunePolish(share)(problem))
    # A polish takes 12 passes of a second, and 3 are left for judging.
    assert training.calls[0]["seconds"] == pytest.approx(expected, abs=2)
    assert given["polish"] == pytest.approx(100 - 3, abs=4)


@pytest.mark.parametrize(("share", "max_time"), [(1.0, 10.0), (0.1, 100.0), (0.5, 1e-9)])
def test_without_time_the_reason_is_said(share: float, max_time: float) -> None:
    training = FakeTraining({})
    problem = make_problem(trained(), known(), training=training, clock=StageTimer(max_time=max_time))
    problem.clock.seconds["collect"] = 1.0
    solution = FineTunePolish(share)(problem)
    assert solution.proposal is None
    assert solution.reason.startswith("no time was left for a repair after ")
    assert solution.reason.endswith(" s; raise `max_time`.")
    assert training.calls == []
    assert solution.steps == ()


def test_where_training_took_all_the_time_in_vain_that_is_said() -> None:
    now = [0.0]

    class Slow(FakeTraining):
        def __call__(self, **rest: Any) -> State | None:
            now[0] += 100
            return super().__call__(**rest)

    problem = make_problem(trained(), known(), training=Slow(None), clock=StageTimer(max_time=50, now=lambda: now[0]))
    solution = FineTunePolish()(problem)
    assert solution.proposal is None
    assert solution.reason.startswith("no time was left for a repair after 10")


def test_a_fit_that_repairs_nothing_is_no_proposal() -> None:
    problem = on_a_line(training=FakeTraining(threshold(0.9)))
    solution = FineTunePolish()(problem)
    assert solution.proposal is None
    assert solution.reason == "no target was repaired without breaking what is right."
    assert [(step.name, step.repaired, step.broken) for step in solution.steps] == [("fit", 0, 0), ("polish", 0, 0)]
    assert [other.name for other in solution.others] == ["fit"]


def test_weights_that_are_no_numbers_are_no_proposal() -> None:
    model = trained().eval()
    nan = {name: torch.full_like(value, math.nan) for name, value in snapshot(model).items()}
    solution = FineTunePolish()(make_problem(model, known(), training=FakeTraining(nan)))
    assert solution.proposal is None
    assert solution.reason == "no target was repaired without breaking what is right."
    assert [(step.name, step.repaired) for step in solution.steps] == [("fit", 0), ("polish", 0)]


@pytest.mark.parametrize("method", [FineTunePolish(), Polish("no such file"), Linearized()])
def test_a_task_without_margins_is_refused_before_any_training(method: Any) -> None:
    training = FakeTraining(None)
    with pytest.raises(ConfigurationError, match=r"`task`: Marginless has no `margin`"):
        method(make_problem(trained(), known(), "0", task=Marginless(), training=training))
    assert training.calls == []


@pytest.mark.parametrize("share", [0, -0.5, 1.5, math.nan, "half"])
def test_a_share_that_is_none_is_refused(share: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"`FineTunePolish.share=.*` is no share"):
        FineTunePolish(share)


def test_a_repair_by_name_writes_what_was_proposed() -> None:
    model = trained()
    outcome = repair_module(model, known(), Settings(method="finetune-polish", bounds=BoundOptions(strength=1.0)))
    assert outcome.report.status == "repaired"
    assert [step.name for step in outcome.report.steps] == ["fit", "polish"]
    assert [split.broken for split in outcome.report.splits] == [0, 0]
    assert list(outcome.report.seconds)[:3] == ["collect", "fit", "polish"]
    problem = make_problem(model, known())
    assert broken(problem, outcome.parameters) == 0


def test_two_ranks_repair_as_one() -> None:
    model = trained().eval()
    alone = FineTunePolish()(make_problem(model, known()))

    def work(problem: Problem) -> Solution:
        # One rank's clock is ahead of the other's.
        clock = StageTimer(max_time=1e4 - 10 * problem.collective.rank)
        return FineTunePolish()(replace(problem, clock=clock))

    first, second = together(model, known(), work)
    assert same(first.proposal.state, second.proposal.state)
    assert (first.proposal.repaired, first.proposal.broken) == (alone.proposal.repaired, 0)
