"""The default: which proposals are made where, and a swarm that starts from them and never ends below."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_problems import Marginless, broken, left_alone, make_problem, on_a_line, retrained, right
from toy_repairs import known, trained

from lightning_nrl import ConfigurationError, ParticleSwarm, Settings, repair_module
from lightning_nrl._utils.state import State
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Auto, Linearized
from lightning_nrl.problem import Problem, Solution
from lightning_nrl.search import RandomStreams, SearchOrigin, Swarm

AUTO = Auto(ParticleSwarm(particles=12, iterations=12))


def problem(layer: str = "auto", **rest: Any) -> Problem:
    own = make_problem(trained(), known(), layer, **rest)
    return replace(own, localizer=NeuRecoverLite(n_weights=12))


def going_on(own: Problem) -> Any:
    def training(*, seconds: float, seed: int, clock: StageTimer, start: State | None = None) -> State:
        return retrained(own.model)

    return training


def names(solution: Solution) -> list[str]:
    return [step.name.split()[0] for step in solution.steps]


def checked(own: Problem, solution: Solution) -> Solution:
    assert solution.proposal is not None
    now = right(own, solution.proposal.state)
    assert solution.proposal.repaired == int((own.before.targeted & now).sum()) > 0
    assert broken(own, solution.proposal.state) == solution.proposal.broken == 0
    return solution


def test_where_everything_may_change_training_goes_on_then_a_swarm_from_there() -> None:
    own = problem()
    with left_alone(own.model):
        solution = checked(own, AUTO(replace(own, training=going_on(own))))
    assert names(solution) == ["fit", "polish", "swarm"]
    assert solution.steps[0].note == "continued training"
    _, polished, last = solution.steps
    assert last.repaired >= polished.repaired
    assert "over its seeds" in last.note or "no target is left" in last.note


def test_without_a_training_to_go_on_with_it_makes_steps_of_its_own() -> None:
    own = problem()
    solution = checked(own, AUTO(own))
    assert names(solution) == ["fit", "polish", "swarm"]
    assert solution.steps[0].note == "distilled steps"


def test_a_last_linear_layer_alone_is_solved() -> None:
    own = problem("2")
    solution = checked(own, AUTO(own))
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
    assert names(solution)[:2] == ["fit", "polish"]


def test_what_is_no_swarm_or_no_solution_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`Auto\.swarm=50` is no searcher"):
        Auto(50)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="`method`: function gave a NoneType, not a solution"):
        repair_module(trained(), known(), Settings(method=lambda problem: None))  # type: ignore[arg-type,return-value]


def test_a_task_without_margins_is_searched_by_the_swarm_alone() -> None:
    own = problem("2", task=Marginless())
    solution = AUTO(own)
    assert names(solution) == ["swarm"]


def test_where_nothing_can_be_kept_the_reason_is_given() -> None:
    own = on_a_line(layer="")
    clash = replace(own, before=replace(own.before, targeted=torch.tensor([False] * 6 + [True])))
    solution = AUTO(clash)
    assert solution.proposal is None or solution.proposal.broken == 0


@pytest.mark.parametrize("seconds", [0.0, 1e-3])
def test_without_time_nothing_is_broken(seconds: float) -> None:
    own = problem(clock=StageTimer(max_time=seconds))
    solution = AUTO(own)
    assert solution.proposal is None or broken(own, solution.proposal.state) == 0


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
