"""Swarms in front of a last layer as one stack, as a device scores them, against each swarm by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scoring_networks import Problem, by_sample
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nrl.evaluation import Evaluator
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.search._scoring.scorer import SwarmScorer, make_scorer, stacked
from lightning_nrl.search.scores import Scores

EVALUATOR = Evaluator(nn.Identity())
"""Of a recording its task and its ranks matter alone."""

N, P, K = 40, 7, 9
FAILED = torch.arange(N) % 4 == 0
SIZES = (9, 2, 5, 9, 1)
LARGE = 1 << 20
"""Bytes of a block that takes all at once."""


def problem(classes: int = 5, dtype: torch.dtype = torch.float32) -> Problem:
    """A layer with biases, and samples of small whole numbers, so that logits are often equal."""
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(6, classes).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=g))
    x = torch.randint(-2, 3, (N, 6), generator=g).to(dtype)
    return Problem(model.eval(), find_layers(model, "", include_bias=True), (x,), torch.arange(N) % classes)


def swarms(own: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, I_pos and candidates of swarms that differ in all of these."""
    g = torch.Generator().manual_seed(1)
    where = torch.stack([torch.randperm(own.space.size, generator=g)[:K] for _ in SIZES])
    where[torch.arange(K) >= torch.tensor(SIZES)[:, None]] = -1
    passed = torch.stack([~FAILED & (torch.rand(N, generator=g) < 0.2 + 0.15 * s) for s in range(len(SIZES))])
    values = own.space.flat()[where.clamp_min(0)][:, None] + torch.randint(-2, 3, (len(SIZES), P, K), generator=g)
    values[:, 0] = own.space.flat()[where.clamp_min(0)]
    return where, passed, values


def same(found: Scores, expected: Scores, exactly: bool = False) -> None:
    """Counts are equal, losses up to rounding or to the bit."""
    for name, value in vars(expected).items():
        if isinstance(value, Tensor) and ("loss" in name or "credit" in name) and not exactly:
            torch.testing.assert_close(getattr(found, name), value)
        elif isinstance(value, Tensor):
            assert torch.equal(getattr(found, name), value), name


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without losses on I_pos": {"passed_loss": False},
    "weights": {"weight": torch.arange(N, dtype=torch.float64)},
    "credits": {"credit": True},
    "reserves": {"reserve": torch.arange(N) % 3 / 2.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("block_bytes", [1, 700, LARGE])
def test_a_stack_scores_each_swarm_as_it_is_scored_by_itself(options: dict[str, Any], block_bytes: int) -> None:
    own = problem()
    where, passed, values = swarms(own)
    expected = make_scorer(own.recording(15, 25), where, FAILED, passed, EVALUATOR, **options)(values)
    scorer = stacked(make_scorer(own.recording(15, 25), where, FAILED, passed, EVALUATOR, **options), K, block_bytes)
    assert all(group.is_stacked for group in scorer.groups)
    same(scorer(values), expected)
    assert torch.equal(by_sample(scorer, values[2], 2)[1].sum(1), (expected.patched + expected.intact)[2].long())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_swarm_among_many_in_a_stack_scores_as_alone_to_the_bit(options: dict[str, Any]) -> None:
    own = problem()
    values = (swarm := swarms(own))[2] + 0.1 * torch.randn(len(SIZES), P, K, generator=torch.Generator().manual_seed(2))
    where, passed = swarm[:2]

    def scored(rows: slice) -> Scores:
        scorer = make_scorer(own.recording(N), where[rows], FAILED, passed[rows], EVALUATOR, **options)
        return stacked(scorer, K, LARGE)(values[rows])

    together = scored(slice(None))
    for s in range(len(SIZES)):
        columns = {n: x[s : s + 1] for n, x in vars(together).items() if isinstance(x, Tensor)}
        same(scored(slice(s, s + 1)), replace(together, **columns), exactly=True)


def test_what_is_in_front_of_another_layer_is_left_to_its_group() -> None:
    own = problem()
    model = nn.Sequential(own.model, nn.ReLU())
    inner = Problem(model, find_layers(model, "0"), own.data, own.target)
    scorer = make_scorer(inner.recording(N), torch.arange(K), FAILED, ~FAILED, EVALUATOR)
    assert stacked(scorer, K, LARGE).stacks == ()
    assert not stacked(scorer, K, LARGE).groups[0].is_stacked


def test_classes_with_few_weights_are_not_padded_to_one_with_many_where_there_is_no_room() -> None:
    g = torch.Generator().manual_seed(0)
    model, x = nn.Linear(64, 20).eval(), torch.randn(N, 64, generator=g)
    own = Problem(model, find_layers(model, ""), (x,), torch.arange(N) % 20)
    where = torch.cat([torch.arange(64), torch.arange(1, 20) * 64])  # all weights of class 0, one of each other
    values = own.space.flat()[where] + torch.randn(1, P, len(where), generator=g)

    def scorer() -> SwarmScorer:
        return make_scorer(own.recording(N), where, FAILED, ~FAILED, EVALUATOR)

    few, many = (stacked(scorer(), len(where), LARGE, room) for room in (100_000, LARGE))
    assert [one.groups[0].is_stacked for one in (few, many)] == [False, True]
    assert sum(stack.x.nbytes for _, stack in many.stacks) > 100_000
    for one in (few, many):
        same(one(values), scorer()(values))


class Operations(TorchDispatchMode):
    """Counts them."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_many_swarms_take_as_many_operations_as_few() -> None:
    own = problem()
    where = torch.stack([torch.arange(6) + 6 * (s % 5) for s in range(30)])

    def operations(n: int) -> int:
        passed = torch.stack([~FAILED & (torch.arange(N) != 1 + 4 * (s % 10)) for s in range(n)])
        scorer = stacked(make_scorer(own.recording(N), where[:n], FAILED, passed, EVALUATOR), 6, LARGE)
        with Operations() as counted:
            scorer(own.space.flat()[where[:n]][:, None].repeat(1, P, 1))
        return counted.n

    assert operations(30) == operations(10)
