"""Steps on a device whose memory holds few samples at once, or none."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_problems import make_problem, same, together
from toy_repairs import known, trained

from lightning_nrl._utils.state import snapshot
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import DeviceMemoryError, RepairWarning
from lightning_nrl.methods import Problem
from lightning_nrl.methods._solvers.descent import Descent
from lightning_nrl.methods._solvers.distill import distill
from lightning_nrl.methods._solvers.mini_batches import load_batches
from lightning_nrl.methods._solvers.polish import polish
from lightning_nrl.tasks import Multiclass

ROWS = torch.arange(100)


class Full(torch.autograd.Function):
    """The identity, whose gradient fits in memory for few samples only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: int) -> Tensor:
        ctx.most = most
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if len(gradient) > ctx.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gradient, None


class Cramped(Multiclass):
    """Multiclass whose logits have a gradient for at most so many samples at once."""

    def __init__(self, most: int) -> None:
        self.most = most

    def logits(self, output: Tensor) -> Tensor:
        return Full.apply(output, self.most)


def loss(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, batch.target, reduction="sum")


def stepped(problem: Problem) -> dict[str, Tensor]:
    descent = Descent(problem, {}, partial(torch.optim.SGD, lr=0.01))
    for parts in load_batches(problem, ROWS.split(50)):
        descent.step(parts, loss)
    return descent.state()


@pytest.mark.parametrize("most", [1, 3, 20])
def test_a_step_that_does_not_fit_is_made_of_smaller_passes(most: int) -> None:
    whole = stepped(make_problem(trained(), known()))
    small = stepped(make_problem(trained(), known(), task=Cramped(most)))
    assert not same(whole, snapshot(trained()))
    for name, value in whole.items():
        torch.testing.assert_close(small[name], value)


def test_a_sample_that_does_not_fit_ends_the_steps_and_changes_nothing() -> None:
    problem = make_problem(trained(), known(), task=Cramped(0))
    descent = Descent(problem, {}, partial(torch.optim.SGD, lr=0.01))
    (parts,) = load_batches(problem, [ROWS])
    with pytest.raises(DeviceMemoryError, match=r"single sample does not fit[\s\S]*HINT"):
        descent.step(parts, loss)
    assert same(descent.state(), {name: value.detach() for name, value in problem.model.named_parameters()})


def test_where_one_rank_runs_out_all_stop() -> None:
    def work(problem: Problem) -> str:
        task = Cramped(0 if problem.collective.rank else 1000)
        try:
            stepped(replace(problem, evaluator=replace(problem.evaluator, task=task)))
        except DeviceMemoryError as error:
            return str(error)
        return "went on"

    first, second = together(trained(), known(), work)
    assert first == second
    assert "does not fit" in first


def test_a_fit_ends_with_a_warning_and_what_it_has() -> None:
    problem = make_problem(trained(), known(), task=Cramped(0))
    with pytest.warns(RepairWarning, match="does not fit"):
        state = distill(problem)
    assert same(state, {name: value.detach() for name, value in problem.model.named_parameters()})


def test_a_polish_scales_back() -> None:
    problem = make_problem(trained(), known(), task=Cramped(0))
    new = {name: value + 0.3 * torch.randn(value.shape) for name, value in problem.model.state_dict().items()}
    assert problem.propose("new", new).broken > 0
    found = polish(problem, new)
    assert (found.broken, found.rounds) == (0, 0)
    assert 0 <= found.strength < 1
    assert math.isfinite(found.gain)
