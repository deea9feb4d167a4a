"""A sparse patch by hand: ten weights of which two do the repair."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_problems import State, make_problem
from toy_repairs import known, quick, trained

from lightning_nrl import TensorSource, repair_module
from lightning_nrl.methods import Method, Problem, Proposal, Solution
from lightning_nrl.pipeline.sparse_patch import sparsify

FIRST = torch.zeros(2, 10)
FIRST[0, 9] = 1.0


class Sums(nn.Module):
    """Logits x9 and w . x, with a count that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 2, bias=False)
        self.head.weight = nn.Parameter(FIRST.clone())
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def problem() -> Problem:
    """Four samples of class 1 that fail: two need weight 3, two weight 7; one of class 0 that
    passes.
    """
    x = torch.zeros(5, 10)
    x[[0, 1], 3] = x[[2, 3], 7] = 1.0
    source = TensorSource(x, torch.tensor([1, 1, 1, 1, 0]), split="all", passed=True, failed=True)
    return make_problem(Sums(), [source])


def patch(**weights: float) -> State:
    """The second class's weights, those named such as `w3`, the rest 0.1."""
    row = torch.full((10,), 0.1)
    for name, value in weights.items():
        row[int(name[1:])] = value
    return {"head.weight": torch.stack([FIRST[0], row]), "count": torch.ones(1)}


def differing(found: Proposal) -> list[int]:
    rows, columns = (found.state["head.weight"] != FIRST).nonzero().unbind(1)
    assert rows.all()
    return columns.tolist()


@pytest.mark.parametrize(("loss", "kept"), [(0.0, [3, 7]), (0.4, [3, 7]), (0.5, [3]), (0.99, [3])])
def test_the_fewest_weights_that_keep_the_repairs(loss, kept):
    own = problem()
    whole = own.propose("whole", patch(w3=2.0, w7=1.0))
    found, step = sparsify(own, whole, loss)
    assert differing(found) == kept
    assert found.state["count"] == 1
    assert (found.repaired, found.broken) == (2 * len(kept), 0)
    assert step.note == f"{len(kept)} of 20 weights differ, 10 before"


@dataclass(frozen=True)
class WeightStats(Method):
    """A method that moves every weight a little."""

    seed: int

    def __call__(self, problem: Problem) -> Solution:
        generator = torch.Generator().manual_seed(self.seed)
        state = {
            name: value.detach() + 0.3 * torch.randn(value.shape, generator=generator)
            for name, value in problem.model.named_parameters()
        }
        return Solution(problem.propose("spread", state))


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 99), loss=st.sampled_from([0.0, 0.3, 0.6]))
def test_no_more_is_lost_and_broken_than_allowed(seed, loss):
    own = make_problem(trained(), known(), seed=seed)
    whole = WeightStats(seed)(own).proposal
    found, _ = sparsify(own, whole, loss)
    recounted = own.propose("again", found.state)
    assert (recounted.repaired, recounted.broken) == (found.repaired, found.broken)
    assert found.repaired >= (1 - loss) * whole.repaired
    assert found.broken <= whole.broken


def test_a_sparse_repair_says_how_many_weights_differ():
    outcome = repair_module(trained(), known(), quick(sparse=0.5))
    assert [step.name for step in outcome.report.steps] == ["swarm", "sparse"]
    full = repair_module(trained(), known(), quick())
    assert outcome.report.change.changed <= full.report.change.changed
