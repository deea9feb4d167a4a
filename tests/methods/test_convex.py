"""A last Linear layer repaired by a quadratic programme."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import nn
from toy_problems import broken, checked, left_alone, make_problem, on_a_line, same, shares, together
from toy_repairs import known, trained

from lightning_nrl import ConfigurationError, TensorSource
from lightning_nrl.methods import Convex


def test_what_can_be_repaired_without_a_regression_is() -> None:
    own = on_a_line(layer="")
    with left_alone(own.model):
        solution = checked(own, Convex()(own))
    # 0.7 is repaired; 0.5 cannot be without breaking 0.6.
    assert solution.proposal is not None
    assert solution.proposal.repaired == 1
    assert set(solution.proposal.state) == {"weight"}


def test_a_target_that_is_alone_is_repaired_though_no_other_speaks_for_it() -> None:
    own = on_a_line(layer="")
    alone = replace(own, before=replace(own.before, targeted=torch.arange(7) == 5))
    solution = Convex()(alone)
    assert {"held out 0 repaired, 0 broken" in step.note for step in solution.steps[:-1]} == {True}
    checked(alone, solution)


@pytest.mark.parametrize("seed", range(3))
def test_no_known_sample_breaks(seed: int) -> None:
    own = make_problem(trained(seed=seed), known(seed), "2")
    solution = checked(own, Convex()(own))
    assert [step.name for step in solution.steps][-1] == "convex"
    assert all(broken(own, other.state) == other.broken for other in solution.others)


def test_two_ranks_solve_what_one_does() -> None:
    model = trained()
    alone = Convex()(make_problem(model, known(), "2")).proposal
    first, second = together(model, known(), lambda own: Convex()(own).proposal, layer="2")
    assert same(first.state, second.state)
    assert (first.repaired, first.broken) == (second.repaired, second.broken) == (alone.repaired, alone.broken)


def test_a_layer_whose_output_is_not_the_logits_is_refused_on_ranks_without_samples_too() -> None:
    sources = [
        TensorSource(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), "passed", passed=True),
        TensorSource(torch.tensor([[1.0, 0.1]]), torch.tensor([1]), "failed", failed=True),
    ]

    def refused(collective: Any) -> str:
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Softmax(1))
        model[0].load_state_dict({"weight": torch.eye(2)})
        own = make_problem(model, shares(sources, collective.rank, 2), collective=collective)
        assert len(list(own.known[0])) == 1 - collective.rank
        with pytest.raises(ConfigurationError, match="the output of `layer='0'` is not what the model returns"):
            Convex()(own)
        return "refused"

    assert on_ranks(2, refused) == ["refused", "refused"]


def test_solving_ends_with_its_time() -> None:
    own = make_problem(trained(), known())
    assert len(Convex()(own).steps) > 3
    solution = Convex(seconds=0.0)(own)
    # The weakest strength, and the verdict on it.
    assert len(solution.steps) == 2
    assert solution.proposal is None or broken(own, solution.proposal.state) == 0
