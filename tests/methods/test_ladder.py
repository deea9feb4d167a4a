"""The default: its rungs, training that is tried out, and the held-out samples that choose."""

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
    broken,
    checked,
    left_alone,
    make_problem,
    retrained,
    right,
    same,
)
from toy_repairs import blobs, known, trained

from lightning_nrl import ConfigurationError, ParticleSwarm, Settings, TensorSource, repair_module
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.gate import Gate
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Auto, Convex, Linearized, Method, Problem, Proposal, Solution
from lightning_nrl.methods import auto as auto_module
from lightning_nrl.methods import held_out as held_out_module
from lightning_nrl.methods.auto import RungResult, chosen_rung
from lightning_nrl.methods.held_out import draw_held_out_rows, estimate
from lightning_nrl.records.steps import CUT, Rung

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
    assert names(solution)[-2:] == ["fit", "polish"]
    said = "continued training, 16 epochs; held-out samples halfway: 7 repaired, 0 broken"
    assert solution.steps[-2].note == said
    # What another rung has searched is no account of the one taken.
    assert [rung.name for rung in solution.rungs if rung.taken] == ["training"]
    assert solution.localization is solution.result is None


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
    assert came // 3 < search.n <= came // 2
    taken = next(rung for rung in solution.rungs if rung.taken)
    assert taken.held_out == solution.held_out
    assert f"`{taken.name}` is taken" in solution.choice


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
    assert none.repaired_in_target >= max(
        rung.repaired_in_target for rung in solution.rungs if not rung.broken
    )
    assert any_number.repaired_in_target >= none.repaired_in_target


def test_a_layer_within_is_linearized() -> None:
    own = problem("0")
    solution = checked(own, AUTO(own))
    assert names(solution)[-1] == "swarm"
    assert solution.proposal is not None
    assert set(solution.proposal.state) <= {"0.weight", "0.bias"}
    assert not {"fit", "convex"} & set(names(solution))


class TimeFirst(torch.nn.Module):
    """Its inner layer sees time first and samples second: gradients cannot be split by sample."""

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
    assert names(solution)[1:] == ["fit", "polish"]


def test_what_is_no_swarm_or_no_solution_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`Auto\.swarm=50` is no searcher"):
        Auto(50)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="is no method"):
        Settings(method=lambda problem: Solution(None))  # type: ignore[arg-type,return-value]

    class Forgetful(Method):
        def __call__(self, problem: Problem) -> Any:
            return None

    with pytest.raises(
        ConfigurationError, match="`method`: Forgetful returned a NoneType instead of a `Solution`"
    ):
        repair_module(trained(), known(), Settings(method=Forgetful()))


def test_a_task_without_margins_is_searched_by_the_swarm_alone() -> None:
    own = problem("2", task=Marginless())
    solution = AUTO(own)
    assert names(solution) == ["swarm"]


def test_what_is_left_of_the_time_goes_to_the_search_where_nothing_trains() -> None:
    ticks = itertools.count()
    own = problem("2", clock=StageTimer(max_time=2.0, now=lambda: 0.005 * next(ticks)))
    solution = checked(own, AUTO(own))
    assert [rung.name for rung in solution.rungs] == ["search", "exact"]
    first, *alternatives, chosen, last = solution.steps
    assert 0 < len(alternatives) < 10
    assert {step.kind for step in alternatives} == {"alternative"}
    assert chosen.note.endswith(f"is chosen; higher prices were {CUT}")
    assert chosen.was_cut
    assert "12 iterations" in last.note
    assert last.repaired >= first.repaired
    assert 0.8 * 2 < own.clock.elapsed < 2
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

    monkeypatch.setattr(auto_module, "Convex", Full)
    own = problem("2")
    solution = checked(own, AUTO(own))
    assert [(rung.name, rung.taken) for rung in solution.rungs] == [
        ("search", True),
        ("exact", False),
    ]
    (step,) = (step for step in solution.steps if step.name == "full")
    assert step.note == "not run: out of memory"


def fitted(own: Problem) -> Rung:
    """The rung of the training."""
    with left_alone(own.model):
        solution = AUTO(own)
    assert solution.proposal is not None
    assert broken(own, solution.proposal.state) == solution.proposal.broken
    return solution.rungs[-1]


def test_training_begins_without_what_is_held_out_and_ends_with_it() -> None:
    own, rows = problem(), draw_held_out_rows(problem())
    assert rows is not None
    training = FakeTraining(retrained(own.model))
    rung = fitted(replace(own, training=training))
    (call,), (renewed,) = training.calls, training.renewed
    assert torch.equal(call["weight"] == 0, rows)
    assert renewed is not None
    assert bool((renewed > 0).all())
    assert (call["rate"], call["epochs"], call["start"]) == (None, 16, None)
    assert rung.held_out == estimate(own.before, own.evaluate(retrained(own.model)), rows)


def test_a_looser_gate_buys_repairs() -> None:
    own = problem()
    new = retrained(own.model)
    found = {}
    for gate in ("instance", "tolerance:100%"):
        training = FakeTraining(barely(own, new), halfway=new)
        found[gate] = fitted(replace(own, training=training, gate=Gate.parse(gate)))
    strict, loose = found.values()
    assert strict.broken == 0 < loose.broken
    assert loose.repaired_in_target >= strict.repaired_in_target


@pytest.mark.parametrize("gate", ["instance", "tolerance:100%"])
def test_how_busy_the_machine_is_changes_nothing(gate: str) -> None:
    found = []
    for speed in (1, 1000):
        clock = StageTimer(now=lambda speed=speed: speed * time.perf_counter())
        solution = AUTO(problem(clock=clock, gate=Gate.parse(gate)))
        assert solution.proposal is not None
        rungs = [replace(rung, seconds=0.0) for rung in solution.rungs]
        steps = [replace(step, seconds=0.0) for step in solution.steps]
        found.append(
            (
                solution.proposal.state,
                (rungs, steps, solution.choice, solution.held_out, solution.price),
            )
        )
    (weights, told), (weights_under_load, told_under_load) = found
    assert told == told_under_load
    assert same(weights, weights_under_load)
    assert not any(step.was_cut for step in told[1])


@pytest.mark.parametrize("seconds", [0.0, 1e-6])
def test_without_time_the_rung_says_what_it_needs(seconds: float) -> None:
    clock = StageTimer(max_time=seconds, now=lambda: 0.0)
    clock.seconds["collect"] = 2.0
    solution = AUTO(problem(clock=clock, training=FakeTraining({})))
    assert solution.proposal is None
    # A second to begin, and ten passes.
    assert "No time was left for training: it needs about 21 s of `max_time`." in solution.reason
    assert [rung.name for rung in solution.rungs] == ["search", "exact", "training"]


@pytest.mark.parametrize(
    ("max_time", "training"),
    [(100.0, 97 - 12 - 1), (31.0, 28 * 2 / 3 - 1), (11.0, 8 * 2 / 3 - 1), (9.0, 3.0)],
)
def test_training_has_what_the_first_searches_leave(max_time: float, training: float) -> None:
    clock = StageTimer(max_time=max_time, now=lambda: 0.0)
    clock.seconds["collect"] = 1.0
    own = problem(clock=clock)
    given = FakeTraining(retrained(own.model))
    AUTO(replace(own, training=given))
    assert given.calls[0]["seconds"] == pytest.approx(training)


def test_what_was_cut_is_climbed_again_in_what_training_leaves() -> None:
    clock = StageTimer(max_time=100.0, now=lambda: 0.0)
    clock.seconds["collect"] = 0.5
    own = problem(clock=clock)
    solution = AUTO(replace(own, training=FakeTraining(retrained(own.model))))
    # A search takes ten passes to prepare: a quarter of a tenth of 98.5 s is too short, a quarter
    # of all of it is not.
    assert [rung.name for rung in solution.rungs] == ["search", "exact", "training"]
    assert solution.rungs[0].repaired_in_target > 0
    assert not any(CUT in rung.note for rung in solution.rungs)


@pytest.mark.parametrize("seed", [0, 1])
def test_with_more_time_no_fewer_are_repaired(seed: int) -> None:
    model, found = trained(seed=seed), list[int]()
    own, now = make_problem(model, known(seed, n=240)), [0.0]

    def pass_time(module: Any, args: Any, output: Any) -> None:
        now[0] += len(args[0]) / len(own.before)  # a second for all known samples

    model.register_forward_hook(pass_time)
    for seconds in (3, 8, 12, 20, 40, None):
        now[0] = 0.0
        clock = StageTimer(max_time=seconds, now=lambda: now[0])
        clock.seconds["collect"] = 1.0
        proposal = AUTO(replace(own, clock=clock, localizer=NeuRecoverLite(n_weights=12))).proposal
        found.append(0 if proposal is None else proposal.repaired)
        assert seconds is None or now[0] <= seconds
    assert found == sorted(found)
    assert found[0] == 0 < found[1]


def counts(repaired: int, broken: int, passed: int = 100, failing: int = 20) -> TargetCounts:
    return TargetCounts(passed - broken, broken, repaired, failing - repaired, failing, repaired)


def test_half_of_what_came_in_with_the_failed_samples_is_held_out_of_each_kind() -> None:
    own = make_problem(trained(), known())
    before, rows = own.before, draw_held_out_rows(own)
    assert rows is not None
    came = torch.zeros_like(rows)
    came[before.of("new")] = True
    assert not (rows & ~came).any()
    for kind in (before.targeted, before.passed):
        assert int((rows & kind).sum()) == int((came & kind).sum()) // 2
    again = draw_held_out_rows(own)
    assert again is not None
    assert torch.equal(rows, again)


def test_no_more_failures_are_held_out_than_an_estimate_needs() -> None:
    own = make_problem(trained(), known(n=3000))
    before, n_failures = own.before, int((~own.before.passed[own.before.of("new")]).sum())
    limit = held_out_module.MAX_HELD_OUT_FAILURES
    assert n_failures > 3 * limit
    rows = draw_held_out_rows(own)
    assert rows is not None
    assert int((rows & ~before.passed).sum()) == limit
    came = int(before.passed[before.of("new")].sum())
    assert int((rows & before.passed).sum()) == limit * came // n_failures


class Placed(TensorSource):
    """Knows which samples of one data set it has."""

    @property
    def identity(self) -> Tensor:
        return torch.stack([torch.zeros_like(self.index), self.index], 1)


def test_of_what_is_in_two_splits_both_copies_are_held_out_and_one_is_counted() -> None:
    points, labels = blobs(60, 1.5)
    hard = Placed(points[:40], labels[:40], split="hard", failed=True)
    own = make_problem(trained(), [Placed(points, labels, split="train", passed=True), hard])
    rows = draw_held_out_rows(own)
    assert rows is not None
    assert not rows[own.before.of("train")].any()
    out = own.without(rows).held_out_rows
    assert out is not None
    assert torch.equal(out[own.before.of("hard")], rows[own.before.of("hard")])
    assert torch.equal(out[own.before.of("train")][:40], rows[own.before.of("hard")])


def test_no_fold_of_the_exact_programmes_keeps_copies_of_what_it_leaves_out() -> None:
    points, labels = blobs(240, 1.5)
    marks = [{"split": "train", "passed": True}, {"split": "hard", "failed": True}]
    copied, known_twice = (
        [kind(points, labels, **mark) for mark in marks] for kind in (Placed, TensorSource)
    )
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
    assert draw_held_out_rows(replace(own, before=replace(own.before, weight=weight))) is None


def test_a_method_is_given_neither_targets_nor_passed_samples_that_are_held_out() -> None:
    own = make_problem(trained(), known())
    rows = draw_held_out_rows(own)
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


EMPTY = problem().before


def rung(
    repaired: int, held_out: TargetCounts | None = None, name: str = "search", **rest: Any
) -> RungResult:
    proposal = Proposal("polish", {}, EMPTY, repaired, 0, **rest)
    return RungResult(
        name, Solution(proposal, "" if repaired else "nothing is repaired.", held_out=held_out), 1.0
    )


@pytest.mark.parametrize(
    ("rungs", "taken"),
    [
        # More repairs win: 0.08 and 0.07 differ by less than chance would.
        ([rung(5, counts(9, 1)), rung(9, counts(8, 1))], 1),
        ([rung(5), rung(9)], 1),
        # 0.19 and 0.03 do not: twice the standard error of their difference is 0.11.
        ([rung(5, counts(19, 0)), rung(9, counts(7, 4))], 0),
        # All are repaired by both: the smaller one, unless the other's net rate is higher.
        ([rung(9), rung(9)], 0),
        ([rung(9, counts(8, 1)), rung(9, counts(8, 1))], 0),
        ([rung(9, counts(8, 0)), rung(9, counts(9, 1))], 0),
        ([rung(9, counts(9, 1)), rung(9, counts(8, 1))], 0),
        ([rung(9, counts(8, 1)), rung(9, counts(9, 1))], 1),
        # Less is repaired: only where held-out samples say so by more than chance, and at least
        # half.
        ([rung(20, counts(8, 1)), rung(19, counts(9, 1))], 0),
        ([rung(20, counts(2, 1)), rung(19, counts(19, 0))], 1),
        ([rung(20, counts(2, 1)), rung(9, counts(19, 0))], 0),
        # Never by harm, however much is repaired, unless nothing else repairs.
        ([rung(5, counts(0, 0)), rung(99, counts(1, 2))], 0),
        ([rung(5), rung(99, counts(1, 2))], 0),
        ([rung(5, counts(1, 2)), rung(9, counts(3, 3))], 1),
        ([rung(99, counts(1, 2)), rung(5, counts(1, 1))], 1),
        ([rung(5, counts(1, 2))], 0),
        ([rung(0, counts(9, 0)), rung(5, counts(1, 2))], 1),
        ([rung(5, counts(1, 2)), rung(9, counts(9, 0), excess=1.0)], 0),
        # What slices need comes first.
        ([rung(9, counts(20, 0), missing=1), rung(9, counts(1, 10))], 1),
        ([rung(9, counts(20, 0), missing=1), rung(9, counts(20, 0), missing=1)], 0),
        # Of as many repairs the best, though a third rung came between them.
        ([rung(12, counts(1, 0)), rung(10, counts(20, 0)), rung(12, counts(50, 50))], 1),
        # The best of three.
        ([rung(5, counts(5, 0)), rung(7, counts(6, 0)), rung(9, counts(1, 2))], 1),
        ([rung(0), rung(0)], None),
    ],
)
def test_the_rung_that_is_taken(rungs: list[RungResult], taken: int | None) -> None:
    assert chosen_rung(rungs)[0] == taken


def test_the_choice_says_what_the_other_rungs_would_have_gained() -> None:
    narrow, wide = rung(9, counts(8, 1), "exact"), rung(9, counts(7, 1), "training")
    gain = (
        "repairs 9 targets; of the held-out samples "
        "it repairs {} of 20 failed and breaks 1 of 100 passed ones."
    )
    assert chosen_rung([rung(1), narrow, wide])[1] == (
        f"`exact` is taken: it {gain.format(8)} "
        f"`search` repairs 1 target. `training` {gain.format(7)}"
    )
    assert chosen_rung([rung(1), rung(9, name="training", excess=1.0)])[1] == (
        "`search` is taken: it repairs 1 target. "
        "`training` has no result: it repairs no target within the gate."
    )
    cut = RungResult("training", Solution(None, "no time was left."), 1.0)
    assert chosen_rung([rung(1), cut])[1].endswith("`training` has no result: no time was left.")
    assert chosen_rung([rung(0), rung(0)]) == (None, "Nothing is repaired.")
