"""The rung that trains: which steps are tried, what goes on from the trial, what is kept where a polish collapses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_problems import FakeTraining, barely, broken, left_alone, make_problem, retrained, right
from toy_repairs import known, trained

from lightning_nrl import ParticleSwarm
from lightning_nrl._utils.state import State, snapshot
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.gate import Gate
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Problem
from lightning_nrl.methods.auto_rungs import RungResult
from lightning_nrl.methods.auto_training import training_rung
from lightning_nrl.methods.held_out import held_out_rows

QUICK = ParticleSwarm(particles=8, iterations=4)


def problem(**rest: Any) -> Problem:
    return replace(make_problem(trained().eval(), known(), **rest), localizer=NeuRecoverLite(n_weights=12))


def run_rung(own: Problem) -> RungResult:
    with left_alone(own.model):
        result = training_rung(own, QUICK, held_out_rows(own))
    assert result is not None
    return result


def run(own: Problem) -> RungResult:
    result = run_rung(own)
    proposal = result.solution.proposal
    assert proposal is not None
    assert broken(own, proposal.state) == proposal.broken == 0
    assert torch.equal(right(own, proposal.state), proposal.after.passed)
    return result


def test_the_owners_steps_are_tried_first_and_go_on_from_the_trial() -> None:
    own = problem()
    new = retrained(own.model)
    training = FakeTraining(new, visits=10 * len(own.before))
    result = run(replace(own, training=training))
    trial, final = training.calls
    # Twice the small fit's visits: two tenths over what is not held out, eight tenths over all.
    n, used = len(own.before), len(own.before) - int(held_out_rows(own).sum())
    assert (trial["rate"], trial["epochs"], trial["start"]) == (None, round(4 * n / used), None)
    assert (final["rate"], final["epochs"]) == (None, 16)
    assert torch.equal(final["start"]["0.weight"], new["0.weight"])
    assert result.note == "continued training"
    assert [step.name for step in result.solution.steps] == ["trial", "fit", "polish", "swarm"]


def test_a_trial_never_trains_on_what_is_held_out() -> None:
    own = problem()
    training = FakeTraining(retrained(own.model))
    rows = held_out_rows(own)
    assert rows is not None
    run(replace(own, training=training))
    trial, final = training.calls
    assert torch.equal(trial["weight"] == 0, rows)
    assert final["weight"] is None


def test_where_the_owners_steps_move_nothing_own_ones_through_the_training_step_are_tried() -> None:
    own = problem()
    new = retrained(own.model)

    def gives(rate: float | None, **rest: Any) -> State:
        return snapshot(own.model) if rate is None else new

    training = FakeTraining(gives=gives)
    result = run(replace(own, training=training))
    assert [call["rate"] for call in training.calls] == [None, 1e-3, 1e-3]
    assert result.note == "own steps through training_step, rate 0.001"


def test_where_no_training_can_go_on_steps_are_distilled() -> None:
    own = problem()
    training = FakeTraining(None)
    result = run(replace(own, training=training))
    assert [call["rate"] for call in training.calls] == [None, 1e-3, 1e-4]
    assert result.note == "distilled steps"


def test_training_that_does_harm_is_given_up_after_its_trials() -> None:
    own = problem()
    bad = {name: -value for name, value in snapshot(own.model).items()}
    training = FakeTraining(bad)
    result = run_rung(replace(own, training=training))
    kinds = [step.note.partition(",")[0] for step in result.solution.steps if step.name == "trial"]
    assert kinds[:3] == ["continued training"] + ["own steps through training_step"] * 2
    # The distilled steps that are tried last do well.
    assert kinds[3] == "distilled steps"
    assert result.note == "distilled steps"


def test_a_looser_gate_buys_repairs() -> None:
    own = problem()
    new = barely(own, retrained(own.model))
    found = {}
    for gate in ("instance", "tolerance:100%"):
        given = replace(own, training=FakeTraining(new), gate=Gate.parse(gate))
        result = training_rung(given, QUICK, held_out_rows(own))
        assert result is not None
        found[gate] = result.solution.proposal
    strict, loose = found.values()
    assert strict is not None
    assert loose is not None
    assert strict.broken == 0 < loose.broken
    assert loose.excess == 0
    assert loose.repaired >= strict.repaired


def test_weights_that_are_no_numbers_are_never_taken() -> None:
    own = problem()
    nan = {name: torch.full_like(value, math.nan) for name, value in snapshot(own.model).items()}
    result = training_rung(replace(own, training=FakeTraining(nan)), QUICK, held_out_rows(own))
    assert result is not None
    assert result.usable is None or broken(own, result.usable.state) == 0


@pytest.mark.parametrize("seconds", [0.0, 1e-6])
def test_without_time_there_is_no_rung(seconds: float) -> None:
    own = problem(clock=StageTimer(max_time=seconds))
    assert training_rung(own, QUICK, held_out_rows(own)) is None


class Screen:
    """An observer that keeps what is announced."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, name: str) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def search(self, done: int, total: int, repaired: int | None = None, broken: int | None = None) -> None:
        return None

    def announce(self, text: str) -> None:
        self.lines.append(text)


def test_what_takes_longer_than_a_few_seconds_is_announced_with_its_time() -> None:
    own = problem()
    for seconds, said in ((45.0, True), (1.0, False)):
        screen = Screen()
        training = FakeTraining(retrained(own.model), fit_seconds=seconds)
        run(replace(own, training=training, clock=StageTimer(screen)))
        assert bool(screen.lines) is said
        # Twice the visits of a small fit, and the polish.
        assert not said or "about 108 s (the fit took 45 s; give `max_time` for less)" in screen.lines[0]
