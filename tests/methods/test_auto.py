"""The default: which proposals are made where, and a swarm that starts from them and never ends below."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_problems import FakeTraining, Marginless, broken, checked, left_alone, make_problem, retrained, right
from toy_repairs import known, trained

from lightning_nrl import ConfigurationError, ParticleSwarm, Settings, repair_module
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Auto, Linearized, Problem, Proposal, Solution
from lightning_nrl.methods import auto as auto_module
from lightning_nrl.methods import auto_rungs as rungs_module
from lightning_nrl.methods.auto import chosen_rung, price_points
from lightning_nrl.methods.auto_rungs import RungResult
from lightning_nrl.search import RandomStreams, SearchOrigin, Swarm
from lightning_nrl.search.loop import TIME_WAS_OVER

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


def test_price_points_are_the_best_within_each_level() -> None:
    fit = TargetCounts(990, 10, 30, 0, targeted=26, repaired_in_target=26)
    polished, between = TargetCounts(1_000, 0, 6, 24, 26, 5), TargetCounts(996, 4, 20, 10, 26, 18)
    estimated = TargetCounts(9, 1, 3, 2, 5, 3)
    found = price_points([(fit, None), (polished, estimated), (between, None)])
    assert [(p.allowed, p.broken, p.repaired_in_target, p.repaired) for p in found] == [
        (0.0, 0, 5, 6),
        (0.001, 0, 5, 6),
        (0.005, 4, 18, 20),
        (0.01, 10, 26, 30),
        (0.02, 10, 26, 30),
        (1.0, 10, 26, 30),
    ]
    assert found[0].held_out == estimated


def test_a_last_linear_layer_alone_is_searched_and_solved() -> None:
    own = problem("2")
    solution = checked(own, AUTO(own))
    assert [rung.name for rung in solution.rungs] == ["search", "exact"]
    assert set(names(solution)) == {"convex", "swarm"}
    assert solution.proposal is not None
    assert {name for name in solution.proposal.state if name != "2.bias"} == {"2.weight"}


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


@pytest.mark.parametrize(("max_time", "goes_on"), [(60.0, True), (0.0, False), (None, False)])
def test_a_search_that_was_cut_short_goes_on_in_what_is_left_of_a_limit(max_time: float | None, goes_on: bool) -> None:
    own = problem("2")
    rung = rungs_module.search_rung(own, AUTO.swarm, None)
    assert rung.solution.result is not None
    rung = replace(rung, solution=replace(rung.solution, result=replace(rung.solution.result, stopped=TIME_WAS_OVER)))
    limited = replace(own, clock=StageTimer(max_time=max_time))
    after, steps = auto_module._searched_on(limited, AUTO.swarm, rung)
    assert [step.name for step in steps] == (["swarm"] if goes_on else [])
    assert (after is rung) is not goes_on
    assert after.solution.result is not None
    assert after.solution.localization is not None


def test_the_same_seed_gives_the_same_weights_and_auto_is_the_default() -> None:
    assert isinstance(Settings().method, Auto)
    one, other = (repair_module(trained(), known(), Settings(method=AUTO, seed=3)) for _ in range(2))
    assert one.parameters
    assert all(torch.equal(value, other.parameters[name]) for name, value in one.parameters.items())
    assert one.report.steps[-1].name == "swarm"


class Greedy(ParticleSwarm):
    """A searcher whose tensors do not fit."""

    def init(self, origin: SearchOrigin, streams: RandomStreams) -> Swarm:
        raise torch.OutOfMemoryError("out of memory")


def test_where_the_search_runs_out_of_memory_the_proposals_are_kept() -> None:
    own = problem("0")
    best = Linearized()(own).proposal
    assert best is not None
    solution = Auto(Greedy())(own)
    assert solution.proposal is not None
    assert solution.proposal.repaired == best.repaired
    assert solution.steps[-1].note == "not run: out of memory"


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
