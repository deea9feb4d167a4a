"""The default: its rungs, training that is tried out, and the held-out samples that choose."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_problems import (
    FakeTraining,
    Marginless,
    StageTimer,
    State,
    barely,
    broken,
    checked,
    left_alone,
    make_problem,
    retrained,
    right,
    snapshot,
)
from toy_repairs import blobs, known, trained

from lightning_nrl import ConfigurationError, ParticleSwarm, Settings, TensorSource, repair_module
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.gate import Gate
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Auto, Convex, Linearized, Problem, Proposal, Solution
from lightning_nrl.methods import auto_rungs as rungs_module
from lightning_nrl.methods.auto import chosen_rung
from lightning_nrl.methods.auto_rungs import RungResult
from lightning_nrl.methods.auto_training import training_rung
from lightning_nrl.methods.held_out import best_index, estimate, held_out_rows

AUTO = Auto(ParticleSwarm(particles=12, iterations=12))


def problem(layer: str = "auto", **rest: Any) -> Problem:
    own = make_problem(trained(), known(), layer, **rest)
    return replace(own, localizer=NeuRecoverLite(n_weights=12))


def names(solution: Solution) -> list[str]:
    return [step.name.split()[0] for step in solution.steps]


def test_where_everything_may_change_all_rungs_are_climbed_and_one_is_taken() -> None:
    own = problem()
    with left_alone(own.model):
        solution = checked(own, AUTO(replace(own, training=FakeTraining(retrained(own.model)))))
    assert [rung.name for rung in solution.rungs] == ["search", "exact", "training"]
    assert [rung.taken for rung in solution.rungs].count(True) == 1
    assert names(solution)[0] == "swarm"
    assert names(solution)[-4:] == ["trial", "fit", "polish", "swarm"]
    assert "continued training" in solution.steps[-4].note
    assert solution.localization is not None
    assert solution.result is not None


def test_each_rung_says_what_it_does_to_samples_that_it_may_not_use() -> None:
    own = problem()
    solution = AUTO(own)
    came = len(own.known[1].index)
    search, exact, training = (rung.held_out for rung in solution.rungs)
    assert search is not None
    assert exact is not None
    assert training is not None
    assert exact.n == came
    assert search.n == training.n
    assert came // 4 < search.n <= came // 3
    taken = next(rung for rung in solution.rungs if rung.taken)
    assert taken.held_out == solution.held_out
    assert f"`{taken.name}` is taken" in solution.choice


def test_a_rung_that_gives_slices_what_they_need_goes_before_one_that_does_not() -> None:
    after = problem().before
    good, bad = TargetCounts(100, 0, 20, 0, 20, 20), TargetCounts(90, 10, 1, 19, 20, 1)
    lacking = Solution(Proposal("swarm", {}, after, 9, 0, missing=1, excess=0.0), held_out=good)
    enough = Solution(Proposal("polish", {}, after, 9, 0, excess=0.0), held_out=bad)
    rungs = [RungResult(name, one, 1.0) for name, one in (("search", lacking), ("training", enough))]
    assert chosen_rung(rungs)[0] == 1
    assert chosen_rung([rungs[0], replace(rungs[0], name="exact")])[0] == 1
    assert chosen_rung(rungs[:1])[0] == 0


def test_the_counts_of_a_rung_are_those_of_the_deployed_model() -> None:
    own = problem()
    solution = checked(own, AUTO(own))
    taken = next(rung for rung in solution.rungs if rung.taken)
    assert solution.proposal is not None
    now = right(own, solution.proposal.state)
    assert taken.repaired == int((~own.before.passed & now).sum())
    assert (taken.repaired_in_target, taken.broken) == (solution.proposal.repaired, 0)
    live = dict(own.model.named_parameters())
    differ = sum(int((live[k] != v).sum()) for k, v in solution.proposal.state.items() if k in live)
    assert taken.weights_changed == differ


def test_the_price_of_zero_is_what_more_could_be_repaired() -> None:
    own = problem()
    solution = AUTO(replace(own, training=FakeTraining(retrained(own.model))))
    none, *_, any_number = solution.price
    assert (none.allowed, none.broken, any_number.allowed) == (0.0, 0, 1.0)
    assert none.repaired_in_target >= max(rung.repaired_in_target for rung in solution.rungs if not rung.broken)
    assert any_number.repaired_in_target >= none.repaired_in_target


def test_a_layer_within_is_linearized() -> None:
    own = problem("0")
    solution = checked(own, AUTO(own))
    assert names(solution)[-1] == "swarm"
    assert solution.proposal is not None
    assert set(solution.proposal.state) <= {"0.weight", "0.bias"}
    assert not {"fit", "convex"} & set(names(solution))


class TimeFirst(torch.nn.Module):
    """Its inner layer sees time first and samples second: no gradient can be told apart by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, _, self.head = trained()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.stack([x, x / 2, x / 4])
        return self.head(torch.relu(self.inner(steps)).mean(0))


def test_what_does_not_suit_the_model_is_passed_over() -> None:
    own = make_problem(TimeFirst(), known(), "inner")
    with pytest.raises(ConfigurationError, match="sample by sample"):
        Linearized()(own)
    solution = checked(own, AUTO(replace(own, localizer=NeuRecoverLite(n_weights=12))))
    assert names(solution) == ["swarm"]


def test_a_block_changes_inside_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Sequential(*trained()[:2]), trained()[2])
    own = make_problem(model, known(), ["0", "1"])
    solution = checked(own, AUTO(replace(own, localizer=NeuRecoverLite(n_weights=12))))
    assert [rung.name for rung in solution.rungs] == ["search", "training"]
    assert names(solution)[1:4] == ["trial", "fit", "polish"]


def test_what_is_no_swarm_or_no_solution_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`Auto\.swarm=50` is no searcher"):
        Auto(50)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="`method`: function gave a NoneType, not a solution"):
        repair_module(trained(), known(), Settings(method=lambda problem: None))  # type: ignore[arg-type,return-value]


def test_a_task_without_margins_is_searched_by_the_swarm_alone() -> None:
    own = problem("2", task=Marginless())
    solution = AUTO(own)
    assert names(solution) == ["swarm"]


@pytest.mark.parametrize("seconds", [0.0, 1e-3])
def test_without_time_nothing_is_broken(seconds: float) -> None:
    own = problem(clock=StageTimer(max_time=seconds))
    solution = AUTO(own)
    assert solution.proposal is None or broken(own, solution.proposal.state) == 0


def test_what_is_left_of_the_time_goes_to_the_search_where_nothing_trains() -> None:
    ticks = itertools.count()
    own = problem("2", clock=StageTimer(max_time=2.0, now=lambda: 0.005 * next(ticks)))
    solution = checked(own, AUTO(own))
    assert [rung.name for rung in solution.rungs] == ["search", "exact"]
    cut_short, last = (step for step in solution.steps[1:] if step.name == "swarm")
    assert "12 iterations" not in cut_short.note
    assert "12 iterations" in last.note
    assert last.repaired >= cut_short.repaired
    assert solution.result is not None
    assert solution.result.iterations == 12
    assert next(rung for rung in solution.rungs if rung.taken).repaired_in_target == last.repaired


def test_where_the_layer_cannot_be_solved_for_want_of_memory_the_search_is_still_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full:
        def __init__(self, *settings: Any) -> None:
            return None

        def __call__(self, problem: Problem) -> Solution:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(rungs_module, "Convex", Full)
    own = problem("2")
    solution = checked(own, AUTO(own))
    assert [(rung.name, rung.taken) for rung in solution.rungs] == [("search", True), ("exact", False)]
    (step,) = (step for step in solution.steps if step.name == "full")
    assert step.note == "not run: out of memory"


QUICK = ParticleSwarm(particles=8, iterations=4)


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


@pytest.mark.parametrize("seconds", [0.0, 1e-6])
def test_without_time_there_is_no_rung(seconds: float) -> None:
    own = problem(clock=StageTimer(max_time=seconds))
    assert training_rung(own, QUICK, held_out_rows(own)) is None


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
    # 0.08 and 0.07 differ by less than chance would.
    assert best_index([counts(9, 1), counts(8, 1)], [5, 9]) == best_index([counts(9, 1), counts(8, 1)], [9, 9]) == 1
    # 0.19 and -0.02 do not: their difference has a standard error of 0.056.
    assert best_index([counts(19, 0), counts(5, 7)], [5, 9]) == 0
    assert best_index([None, counts(3, 5)], [5, 9]) == 1
    assert best_index([None, counts(0, 9)], [5, 9]) == 0


def test_what_repairs_less_than_a_cheaper_one_is_taken_only_if_held_out_samples_are_for_it() -> None:
    alike = [counts(9, 1), counts(8, 1)]
    assert best_index(alike, [20, 20]) == 1
    # Behind in both.
    assert best_index(alike, [20, 19]) == 0
    # Behind on known targets alone, and far behind.
    assert best_index(alike[::-1], [20, 19]) == 1
    assert best_index(alike[::-1], [20, 9]) == 0
