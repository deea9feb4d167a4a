"""The default climbs: each rung from where the last one stands, kept unless it does harm."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_problems import (
    FakeTraining,
    Marginless,
    StageTimer,
    barely,
    between,
    broken,
    checked,
    left_alone,
    make_problem,
    memorised,
    retrained,
    right,
    same,
    snapshot,
)
from toy_repairs import blobs, known, trained

from lightning_nrl import ConfigurationError, ParticleSwarm, Settings, TensorSource, repair_module
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.gate import Gate
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Auto, Convex, Method, Problem, Solution
from lightning_nrl.methods import auto as auto_module
from lightning_nrl.methods import held_out as held_out_module
from lightning_nrl.methods.held_out import draw_held_out_rows, estimate, is_ahead
from lightning_nrl.records.steps import Rung

AUTO = Auto(ParticleSwarm(particles=12, iterations=12), caution=0)


def with_few_weights(problem: Problem) -> Problem:
    return replace(problem, localizer=NeuRecoverLite(n_weights=12))


def make(layer: str = "auto", **settings: Any) -> Problem:
    return with_few_weights(make_problem(trained(), known(), layer, **settings))


def names(solution: Solution) -> list[str]:
    return [step.name.split()[0] for step in solution.steps]


def rungs(solution: Solution) -> dict[str, bool]:
    """Whether each rung is kept."""
    return {rung.name: rung.kept for rung in solution.rungs}


def last_kept(solution: Solution) -> Rung:
    return [rung for rung in solution.rungs if rung.kept][-1]


def test_each_rung_starts_where_the_last_one_ended():
    problem = make()
    with left_alone(problem.model):
        solution = checked(problem, AUTO(problem))
    assert rungs(solution) == {"search": True, "training": False, "exact": True, "push": True}
    search, _, exact, push = solution.rungs
    # The steps of a rung count what it adds.
    *_, convex, polish = solution.steps
    assert (convex.name, polish.name) == ("convex", "polish")
    assert convex.repaired > 0 < polish.repaired
    assert exact.repaired_in_target == search.repaired_in_target + convex.repaired
    assert push.repaired_in_target == exact.repaired_in_target + polish.repaired


@pytest.mark.parametrize("part", [0.6, 1.0])
def test_a_training_that_is_better_starts_over_from_the_original_weights(part):
    problem = make()
    state = between(snapshot(problem.model), retrained(problem.model), part)
    training = FakeTraining(state)
    solution = checked(problem, AUTO(replace(problem, training=training)))
    assert solution.rungs[1].repaired_in_target > solution.rungs[0].repaired_in_target
    kept = rungs(solution)
    assert not kept.pop("search")
    assert kept.pop("training")
    # If all is repaired, nothing is left for the rungs above.
    is_left = solution.rungs[1].repaired_in_target < int(problem.before.targeted.sum())
    assert ("exact" in kept) == is_left
    assert "push" in kept or solution.rungs[-1].repaired_in_target == problem.before.targeted.sum()
    assert training.calls[0]["start"] == {}
    assert solution.held_out == solution.rungs[1].held_out


def test_the_held_out_samples_are_known_to_no_rung_before_they_are_counted():
    problem = make()
    rows = draw_held_out_rows(problem)
    assert rows is not None
    training = FakeTraining(retrained(problem.model))
    solution = AUTO(replace(problem, training=training))
    first, second, last = (call["weight"] == 0 for call in training.calls)
    assert torch.equal(first, rows)
    assert torch.equal(second, rows)
    assert not last.any()
    after = problem.evaluate(retrained(problem.model))
    assert solution.rungs[1].held_out == estimate(problem.before, after, rows)
    assert solution.rungs[1].n_choices == 2  # counts, after each round but the last


def test_a_rung_that_harms_samples_it_does_not_use_is_not_kept():
    """Wrong labels that are learned by heart make neighbours wrong."""
    problem = with_few_weights(memorised(300, 6, 64, n_wrong=60, layer="0"))
    solution = checked(problem, AUTO(problem))
    assert not rungs(solution)["exact"]
    exact = solution.rungs[1].held_out
    assert exact.broken > exact.repaired
    harm = f"breaks {exact.broken} of the samples that it does not use and repairs {exact.repaired}"
    assert f"`exact` is not kept: it {harm}." in solution.choice


@pytest.mark.parametrize("gate", ["instance", "tolerance:100%"])
def test_the_last_rung_that_is_kept_is_the_repair(gate):
    problem = make(gate=Gate.parse(gate))
    solution = AUTO(problem)
    rung = last_kept(solution)
    proposal = solution.proposal
    passes = right(problem, proposal.state)
    assert rung.repaired == int((~problem.before.passed & passes).sum())
    assert rung.repaired_in_target == proposal.repaired
    assert rung.broken == proposal.broken == broken(problem, proposal.state)
    live = dict(problem.model.named_parameters())
    assert rung.weights_changed == sum(
        int((live[name] != value).sum()) for name, value in proposal.state.items()
    )
    # The more may break, the more is repaired.
    repaired = [point.repaired_in_target for point in solution.price]
    assert repaired == sorted(repaired)
    assert repaired[-1] >= rung.repaired_in_target
    for name, kept in rungs(solution).items():
        assert f"`{name}` is {'kept' if kept else 'not kept'}: " in solution.choice


def test_a_looser_gate_buys_repairs():
    repaired = []
    for gate in ("instance", "tolerance:100%"):
        problem = make(gate=Gate.parse(gate))
        new = retrained(problem.model)
        training = FakeTraining(new, new, barely(problem, new))
        rung = AUTO(replace(problem, training=training)).rungs[1]
        assert (rung.broken > 0) == (gate != "instance")
        repaired.append(rung.repaired_in_target)
    assert repaired == sorted(repaired)


def test_quotas_are_met_by_the_whole_climb():
    problem = make()
    before = replace(
        problem.before, slice_number=problem.before.label, slices=("first", "second", "third")
    )
    for n, is_met in ((12, True), (16, False)):
        solution = AUTO(replace(problem, before=before, needed={"first": n}))
        assert (solution.proposal.missing == 0) == is_met
        # The search alone does not meet them.
        assert solution.rungs[0].repaired_in_target < 12


def test_a_layer_within_is_trained():
    problem = make("0")
    solution = checked(problem, AUTO(problem))
    assert rungs(solution) == {"search": True, "exact": True, "push": True}
    assert names(solution)[:3] == ["swarm", "fit", "polish"]
    assert set(solution.proposal.state) <= {"0.weight", "0.bias"}


def test_an_update_is_searched_and_polished():
    problem = make(update=True)
    solution = checked(problem, AUTO(problem))
    assert list(rungs(solution)) == ["search", "polish"]
    assert names(solution) == ["swarm", "polish"]
    assert solution.held_out is None


def test_a_block_changes_inside_alone():
    model = torch.nn.Sequential(torch.nn.Sequential(*trained()[:2]), trained()[2])
    problem = with_few_weights(make_problem(model, known(), ["0", "1"]))
    solution = checked(problem, AUTO(problem))
    assert list(rungs(solution)) == ["search", "training", "push"]
    assert names(solution) == ["swarm", "fit", "polish", "polish"]


def test_what_is_no_swarm_or_no_solution_is_refused():
    with pytest.raises(ConfigurationError, match=r"`Auto\.swarm=50` is no searcher"):
        Auto(50)
    with pytest.raises(ConfigurationError, match="is no method"):
        Settings(method=lambda problem: Solution(None))

    class Forgetful(Method):
        def __call__(self, problem: Problem) -> Any:
            return None

    with pytest.raises(
        ConfigurationError, match="`method`: Forgetful returned a NoneType instead of a `Solution`"
    ):
        repair_module(trained(), known(), Settings(method=Forgetful()))


def test_a_task_without_margins_is_searched_by_the_swarm_alone():
    solution = AUTO(make("2", task=Marginless()))
    assert names(solution) == ["swarm"]
    assert "give it some: `Custom(passed=..., loss=..., margin=f)`" in solution.choice


def test_a_layer_that_does_not_fit_in_memory_is_not_solved(monkeypatch):
    def full(*settings: Any) -> Any:
        def solve(problem: Problem) -> Solution:
            raise torch.OutOfMemoryError("out of memory")

        return solve

    monkeypatch.setattr(auto_module, "Convex", full)
    problem = make("2")
    solution = checked(problem, AUTO(problem))
    assert rungs(solution) == {"search": True, "exact": False, "push": False}
    (step,) = (step for step in solution.steps if step.name == "convex")
    assert step.note == "not run: out of memory"


@pytest.mark.parametrize("gate", ["instance", "tolerance:100%"])
def test_how_busy_the_machine_is_changes_nothing(gate):
    solutions = []
    for speed in (1, 1000):
        clock = StageTimer(now=lambda speed=speed: speed * time.perf_counter())
        solutions.append(AUTO(make(clock=clock, gate=Gate.parse(gate))))
    quiet, busy = solutions
    assert same(quiet.proposal.state, busy.proposal.state)
    for part in ("rungs", "steps"):
        records = [
            [replace(record, seconds=0.0) for record in getattr(solution, part)]
            for solution in solutions
        ]
        assert records[0] == records[1]
    assert (quiet.choice, quiet.held_out, quiet.price) == (busy.choice, busy.held_out, busy.price)
    assert not any(step.was_cut for step in busy.steps)


def frozen_clock(max_time: float, one_pass: float) -> StageTimer:
    """A clock that stands still, after a pass that took so many seconds."""
    clock = StageTimer(max_time=max_time, now=lambda: 0.0)
    clock.seconds["collect"] = one_pass
    return clock


@pytest.mark.parametrize("seconds", [0.0, 1e-6])
def test_without_time_the_reason_says_what_training_needs(seconds):
    problem = make(clock=frozen_clock(seconds, 2.0), training=FakeTraining({}))
    solution = AUTO(problem)
    assert solution.proposal is None
    # A second to begin, five passes and one to judge.
    assert "No time was left for training: it needs about 13 s of `max_time`." in solution.reason
    assert not any(rungs(solution).values())


@pytest.mark.parametrize(
    ("max_time", "seconds"),
    [
        # 70 % of all but a pass to judge, without 12 to polish, halved as another round follows.
        (100.0, (0.7 * 99 - 12) / 2 - 1),
        # A third for a shorter polish, and a pass to count its result.
        (31.0, (0.7 * 30 - 1) * 2 / 3 / 2 - 1),
        # There is time for one round.
        (11.0, (10 - 1) * 2 / 3 - 1),
    ],
)
def test_training_has_a_share_of_the_time(max_time, seconds):
    problem = make(clock=frozen_clock(max_time, 1.0))
    training = FakeTraining(retrained(problem.model))
    AUTO(replace(problem, training=training))
    assert training.calls[0]["seconds"] == pytest.approx(seconds)


def test_time_for_one_layer_is_used_up_and_kept():
    ticks = itertools.count()
    problem = make("2", clock=StageTimer(max_time=2.0, now=lambda: 0.005 * next(ticks)))
    solution = checked(problem, AUTO(problem))
    assert rungs(solution)["search"]
    assert any(step.was_cut for step in solution.steps)
    assert 0.5 * 2 < problem.clock.elapsed < 2


def test_time_is_kept_and_nothing_is_broken_for_it():
    problem, now = with_few_weights(make_problem(trained(), known(n=240))), [0.0]

    def pass_time(module: Any, args: Any, output: Any) -> None:
        now[0] += len(args[0]) / len(problem.before)  # a second for all known samples

    problem.model.register_forward_hook(pass_time)
    for seconds in (3, 8, 20, 40):
        now[0] = 0.0
        clock = StageTimer(max_time=seconds, now=lambda: now[0])
        clock.seconds["collect"] = 1.0
        solution = AUTO(replace(problem, clock=clock))
        assert now[0] <= seconds
        assert (solution.proposal is None) == (seconds == 3)
        if solution.proposal is not None:
            checked(problem, solution)


def counts(repaired: int, broken: int, passed: int = 100, failing: int = 20) -> TargetCounts:
    return TargetCounts(passed - broken, broken, repaired, failing - repaired, failing, repaired)


@pytest.mark.parametrize(
    ("value", "held_out", "other_value", "other", "ahead"),
    [
        # More repairs win: 0.07 and 0.08 differ by less than chance would.
        (9, counts(8, 1), 5, counts(9, 1), True),
        (9, None, 5, None, True),
        # 0.03 and 0.19 do not: twice the standard error of their difference is 0.11.
        (9, counts(7, 4), 5, counts(19, 0), False),
        # As much or less: only where held-out samples say so by more than chance, and at least
        # half.
        (9, counts(8, 1), 9, counts(8, 1), False),
        (19, counts(9, 1), 20, counts(8, 1), False),
        (19, counts(19, 0), 20, counts(2, 1), True),
        (9, counts(19, 0), 20, counts(2, 1), False),
    ],
)
def test_when_a_training_is_better_than_a_search(value, held_out, other_value, other, ahead):
    assert is_ahead(value, held_out, other_value, other) == ahead


def test_half_of_what_came_in_with_the_failed_samples_is_held_out_of_each_kind():
    problem = make_problem(trained(), known())
    before, rows = problem.before, draw_held_out_rows(problem)
    assert rows is not None
    came = torch.zeros_like(rows)
    came[before.of("new")] = True
    assert not (rows & ~came).any()
    for kind in (before.targeted, before.passed):
        assert int((rows & kind).sum()) == int((came & kind).sum()) // 2
    again = draw_held_out_rows(problem)
    assert again is not None
    assert torch.equal(rows, again)


def test_no_more_failures_are_held_out_than_an_estimate_needs():
    problem = make_problem(trained(), known(n=3000))
    before, n_failures = (
        problem.before,
        int((~problem.before.passed[problem.before.of("new")]).sum()),
    )
    limit = held_out_module.MAX_HELD_OUT_FAILURES
    assert n_failures > 3 * limit
    rows = draw_held_out_rows(problem)
    assert rows is not None
    assert int((rows & ~before.passed).sum()) == limit
    came = int(before.passed[before.of("new")].sum())
    assert int((rows & before.passed).sum()) == limit * came // n_failures


class Placed(TensorSource):
    """Knows which samples of one data set it has."""

    @property
    def identity(self) -> Tensor:
        return torch.stack([torch.zeros_like(self.index), self.index], 1)


def test_of_what_is_in_two_splits_both_copies_are_held_out_and_one_is_counted():
    points, labels = blobs(60, 1.5)
    hard = Placed(points[:40], labels[:40], split="hard", failed=True)
    problem = make_problem(trained(), [Placed(points, labels, split="train", passed=True), hard])
    rows = draw_held_out_rows(problem)
    assert not rows[problem.before.of("train")].any()
    out = problem.without(rows).held_out_rows
    assert torch.equal(out[problem.before.of("hard")], rows[problem.before.of("hard")])
    assert torch.equal(out[problem.before.of("train")][:40], rows[problem.before.of("hard")])


def test_no_fold_of_the_exact_programmes_keeps_copies_of_what_it_leaves_out():
    points, labels = blobs(240, 1.5)
    marks = [{"split": "train", "passed": True}, {"split": "hard", "failed": True}]
    copied, known_twice = (
        [kind(points, labels, **mark) for mark in marks] for kind in (Placed, TensorSource)
    )
    found = Convex()(make_problem(trained(), copied)).held_out
    assert found.broken > 0
    # Where nobody knows that they are the same, copies stay, and have to stay right.
    blind = Convex()(make_problem(trained(), known_twice)).held_out
    assert blind.broken == 0


def test_what_is_protected_stays_in():
    problem = make_problem(trained(), known())
    weight = torch.where(problem.before.passed, torch.inf, 1.0).double()
    assert (
        draw_held_out_rows(replace(problem, before=replace(problem.before, weight=weight))) is None
    )


def test_a_method_is_given_neither_targets_nor_passed_samples_that_are_held_out():
    problem = make_problem(trained(), known())
    rows = draw_held_out_rows(problem)
    without = problem.without(rows)
    assert not (without.before.passed & rows).any()
    assert not (without.before.targeted & rows).any()
    assert torch.equal(without.used, ~rows)
    everything = replace(problem.before, passed=torch.ones_like(problem.before.passed))
    proposal = without.counted("all", {}, everything)
    assert proposal.repaired == int((problem.before.targeted & ~rows).sum())
    found = estimate(problem.before, everything, rows)
    assert (found.repaired, found.broken) == (int((rows & ~problem.before.passed).sum()), 0)
