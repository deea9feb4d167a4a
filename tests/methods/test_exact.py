"""Layers that are solved: by hand, without a regression, and alike on two ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from toy_problems import (
    StageTimer,
    broken,
    checked,
    left_alone,
    make_problem,
    on_a_line,
    right,
    same,
    shares,
    together,
)
from toy_repairs import blobs, known, trained

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl.methods import Convex, Linearized, Problem, Proposal
from lightning_nrl.records.steps import CUT


def test_what_can_be_repaired_without_a_regression_is() -> None:
    problem = on_a_line(layer="")
    with left_alone(problem.model):
        solution = checked(problem, Convex()(problem))
    # 0.7 is repaired; 0.5 cannot be without breaking 0.6.
    assert solution.proposal is not None
    assert solution.proposal.repaired == 1
    assert set(solution.proposal.state) == {"weight"}


@pytest.mark.parametrize("seed", range(2))
def test_no_known_sample_breaks(seed: int) -> None:
    problem = make_problem(trained(seed=seed), known(seed), "2")
    solution = checked(problem, Convex()(problem))
    assert [step.name for step in solution.steps][-1] == "convex"
    assert all(broken(problem, other.state) == other.broken for other in solution.alternatives)


@pytest.mark.parametrize("n_scored", [60, 1000])
def test_two_ranks_solve_what_one_does(n_scored: int) -> None:
    def solve(problem: Problem) -> Proposal | None:
        return Convex()(replace(problem, n_scored=n_scored)).proposal

    model = trained()
    alone = solve(make_problem(model, known(), "2"))
    first, second = together(model, known(), solve, layer="2")
    assert same(first.state, second.state)
    assert (
        (first.repaired, first.broken)
        == (second.repaired, second.broken)
        == (alone.repaired, alone.broken)
    )


@pytest.mark.parametrize("n_scored", [40, 100])
def test_what_is_solved_for_a_part_of_the_samples_breaks_none_of_the_others(n_scored: int) -> None:
    problem = replace(make_problem(trained(), known(), "2"), n_scored=n_scored)
    solution = checked(problem, Convex()(problem))
    assert f"on {n_scored} of" in solution.steps[-1].note
    assert solution.proposal is not None
    assert solution.proposal.repaired > 0
    assert solution.proposal.broken == 0


def test_a_layer_whose_output_is_not_the_logits_is_refused_on_ranks_without_samples_too() -> None:
    sources = [
        TensorSource(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), "passed", passed=True),
        TensorSource(torch.tensor([[1.0, 0.1]]), torch.tensor([1]), "failed", failed=True),
    ]

    def refused(collective: Any) -> str:
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Softmax(1))
        model[0].load_state_dict({"weight": torch.eye(2)})
        problem = make_problem(model, shares(sources, collective.rank, 2), collective=collective)
        assert len(list(problem.known[0])) == 1 - collective.rank
        with pytest.raises(
            ConfigurationError, match="the output of `layer='0'` is not the model's logits"
        ):
            Convex()(problem)
        return "refused"

    assert on_ranks(2, refused) == ["refused", "refused"]


def test_solving_ends_with_its_time() -> None:
    problem = make_problem(trained(), known(), clock=StageTimer(now=lambda: 0.0))
    assert len(Convex()(problem).steps) > 3
    assert Convex(seconds=0.0)(problem).reason == "no time was left to solve anything."
    asked = itertools.count(1.0)
    # Time is over within the lowest price: its change and the verdict on it are all.
    counts = set()
    for seconds in range(1, 30, 2):
        solution = Convex(seconds=seconds)(
            replace(problem, clock=StageTimer(now=lambda: next(asked)))
        )
        counts.add(len(solution.steps))
        assert solution.proposal is None or broken(problem, solution.proposal.state) == 0
    assert {0, 2} <= counts


def test_the_path_ends_after_a_strength_with_too_many_rows() -> None:
    problem = make_problem(trained(), known())
    whole, short = Convex()(problem), Convex(max_pairs=1)(problem)
    assert len(short.steps) == 2 < len(whole.steps)
    assert short.proposal is None or broken(problem, short.proposal.state) == 0
    assert Convex(max_pairs=100_000)(problem).steps[-1].note == whole.steps[-1].note
    with pytest.raises(ConfigurationError, match=r"`Convex\.max_pairs=0`"):
        Convex(max_pairs=0)


def plane() -> nn.Sequential:
    """Logits 0 and x, for points (x, y): class 1 right of the y axis."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    model[0].weight.data, model[1].weight.data = (
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[0.0], [1.0]]),
    )
    return model


def source(
    points: Sequence[Sequence[float]], labels: Sequence[int], split: str, **marks: Any
) -> TensorSource:
    return TensorSource(torch.tensor(points), torch.tensor(labels), split, **marks)


def on_the_axis() -> list[TensorSource]:
    """Passed points have margin 1; the target lies on the border, in a direction in which no passed
    point lies.
    """
    return [
        source([[1.0, 0.0], [-1.0, 0.0]], [1, 0], "train", passed=True),
        source([[0.0, 1.0]], [1], "new", failed=True),
    ]


def test_a_repair_in_the_first_of_two_layers_worked_out_by_hand() -> None:
    solution = Linearized()(make_problem(plane(), on_the_axis(), "0"))
    assert solution.proposal is not None
    assert (solution.proposal.repaired, solution.proposal.broken) == (1, 0)
    # A fifth of the median margin 1, all of it where it moves no passed point.
    assert solution.proposal.state.keys() == {"0.weight"}
    torch.testing.assert_close(solution.proposal.state["0.weight"], torch.tensor([[1.0, 0.2]]))
    (step,) = solution.steps
    assert (step.name, step.repaired, step.broken, step.note) == (
        "linearized",
        1,
        0,
        "3 gradients, the whole step",
    )


def test_a_target_that_a_passed_sample_contradicts_stays_and_nothing_breaks() -> None:
    twins = [
        source([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], [1, 0, 0], "train", passed=True),
        source([[0.0, 1.0]], [1], "new", failed=True),
    ]
    solution = Linearized()(make_problem(plane(), twins, "0"))
    assert solution.proposal is None
    assert solution.reason == "no step along the gradients repairs a target without a regression."
    assert all(step.broken == step.repaired for step in solution.steps)
    assert not any(step.was_cut for step in solution.steps)
    ticks = itertools.count()
    clock = StageTimer(max_time=0.1, now=lambda: 0.01 * next(ticks))
    (step,) = Linearized()(make_problem(plane(), twins, "0", clock=clock)).steps
    assert step.was_cut
    assert step.note.endswith(f"; {CUT}")


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    layer=st.sampled_from(["0", "2", ("0", "2")]),
    shift=st.floats(0.5, 2.5),
)
def test_it_never_breaks_a_known_sample(seed: int, layer: Any, shift: float) -> None:
    sources = [
        TensorSource(*blobs(80, seed=seed), split="train", passed=True),
        TensorSource(*blobs(40, shift, seed + 1), split="new", failed=True),
    ]
    problem = make_problem(
        trained(seed=seed % 7), sources, list(layer) if isinstance(layer, tuple) else layer
    )
    with left_alone(problem.model):
        solution = Linearized()(problem)
    if solution.proposal is None:
        assert solution.reason
    else:
        now = right(problem, solution.proposal.state)
        assert broken(problem, solution.proposal.state) == solution.proposal.broken == 0
        assert solution.proposal.repaired == int((now & problem.before.targeted).sum()) > 0
        assert [other.broken for other in solution.alternatives] == [0] * len(solution.alternatives)


def test_two_ranks_end_with_the_same_weights_and_repair_what_one_does() -> None:
    alone = Linearized()(make_problem(trained(), known(), "0")).proposal
    first, second = together(
        trained(), known(), lambda problem: Linearized()(problem).proposal, layer="0"
    )
    assert alone is not None
    assert same(first.state, second.state)
    assert (first.repaired, first.broken) == (second.repaired, second.broken) == (alone.repaired, 0)
    torch.testing.assert_close(
        first.state["0.weight"], alone.state["0.weight"], rtol=1e-3, atol=1e-4
    )


def test_mixed_precision_is_repaired_as_deployed() -> None:
    problem = make_problem(
        trained(), known(), "0", context=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    solution = Linearized()(problem)
    assert solution.proposal is not None
    assert (solution.proposal.broken, solution.proposal.repaired > 0) == (0, True)
    assert problem.propose("again", solution.proposal.state).repaired == solution.proposal.repaired


class Functional(nn.Module):
    """Gives a layer's weights to a function, so that the layer itself is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = plane()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[1](F.linear(x, self.inner[0].weight))


def test_a_layer_that_gradients_do_not_reach_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`layer='inner.0'`.*\nHINT: .*`method='swarm'`"):
        Linearized()(make_problem(Functional(), on_the_axis(), "inner.0"))


def test_a_layer_that_no_margin_depends_on_is_no_error() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2))
    model[0].weight.data, model[1].weight.data = torch.zeros(1, 2), torch.zeros(2, 1)
    model[1].bias.data = torch.tensor([0.0, 1.0])
    sources = [
        source([[1.0, 0.0]], [1], "train", passed=True),
        source([[0.0, 1.0]], [0], "new", failed=True),
    ]
    solution = Linearized()(make_problem(model, sources, "0"))
    assert solution.proposal is None
    assert solution.reason == "the margins of the targets do not depend on the layer's weights."
