"""Layers that are solved: by hand, without a regression, and alike on two ranks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from toy_problems import (
    StageTimer,
    broken,
    checked,
    left_alone,
    make_problem,
    on_a_line,
    same,
    shares,
    together,
)
from toy_repairs import known, trained

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl.methods import Convex, Problem, Proposal


def test_what_can_be_repaired_without_a_regression_is():
    problem = on_a_line(layer="")
    with left_alone(problem.model):
        solution = checked(problem, Convex()(problem))
    # 0.7 is repaired; 0.5 cannot be without breaking 0.6.
    assert solution.proposal.repaired == 1
    assert set(solution.proposal.state) == {"weight"}


@pytest.mark.parametrize("seed", range(2))
def test_no_known_sample_breaks(seed):
    problem = make_problem(trained(seed=seed), known(seed), "2")
    solution = checked(problem, Convex()(problem))
    assert [step.name for step in solution.steps][-1] == "convex"


@pytest.mark.parametrize("n_scored", [60, 1000])
def test_two_ranks_solve_what_one_does(n_scored):
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
def test_what_is_solved_for_a_part_of_the_samples_breaks_none_of_the_others(n_scored):
    problem = replace(make_problem(trained(), known(), "2"), n_scored=n_scored)
    solution = checked(problem, Convex()(problem))
    assert f"on {n_scored} of" in solution.steps[-1].note
    assert solution.proposal.repaired > 0
    assert solution.proposal.broken == 0


def test_a_layer_whose_output_is_not_the_logits_is_refused_on_ranks_without_samples_too():
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


def test_solving_ends_with_its_time():
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


def test_the_path_ends_after_a_strength_with_too_many_rows():
    problem = make_problem(trained(), known())
    whole, short = Convex()(problem), Convex(max_pairs=1)(problem)
    assert len(short.steps) == 2 < len(whole.steps)
    assert short.proposal is None or broken(problem, short.proposal.state) == 0
    assert Convex(max_pairs=100_000)(problem).steps[-1].note == whole.steps[-1].note
    with pytest.raises(ConfigurationError, match=r"`Convex\.max_pairs=0`"):
        Convex(max_pairs=0)
