"""Steps on mini-batches over splits, ranks and processes: by hand, with teachers, where memory
holds few samples.
"""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Collective
from torch import Tensor, nn
from toy_problems import (
    barely,
    broken,
    distilled,
    left_alone,
    make_problem,
    normed,
    retrained,
    same,
    shares,
    snapshot,
    together,
)
from toy_repairs import known, trained
from two_processes import in_two_processes

from lightning_nrl import TensorSource
from lightning_nrl.data.batch import Batch
from lightning_nrl.errors import DeviceMemoryError
from lightning_nrl.methods import Problem
from lightning_nrl.methods.solvers.descent import Descent
from lightning_nrl.methods.solvers.mini_batches import load_batches
from lightning_nrl.methods.solvers.polish import polish
from lightning_nrl.methods.solvers.teacher import Teacher
from lightning_nrl.published import Apricot
from lightning_nrl.tasks import Multiclass

SGD = partial(torch.optim.SGD, lr=0.1)


def two_weights(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Logits x and 0."""
    model = nn.Linear(1, 2, bias=False, dtype=dtype)
    model.weight.data = torch.tensor([[1.0], [0.0]], dtype=dtype)
    return model


def numbers(
    *x: float, split: str = "train", batch_size: int = 256, dtype: torch.dtype = torch.float32
) -> TensorSource:
    """Samples of class 0."""
    inputs = torch.tensor(x, dtype=dtype)[:, None]
    return TensorSource(
        inputs, torch.zeros(len(x), dtype=torch.int64), split, True, True, batch_size=batch_size
    )


def parts_of(problem: Problem, *rows: int) -> list[tuple[Batch, Tensor]]:
    (parts,) = load_batches(problem, [torch.tensor(rows)])
    return parts


def first_logit(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
    return output[:, 0].sum()


def test_a_plain_step_by_hand():
    problem = make_problem(two_weights(), [numbers(2, 3)])
    steps = Descent(problem, {}, SGD)
    with left_alone(problem.model):
        # The sum over the samples of w0 x has the slope 2 + 3.
        steps.step(parts_of(problem, 0, 1), first_logit)
        assert steps.state()["weight"].tolist() == [[0.5], [0.0]]
        steps.step(parts_of(problem, 0), first_logit, rate=0.5)
        assert steps.state()["weight"].tolist() == [[-0.5], [0.0]]
        steps.step(parts_of(problem, 1), first_logit)
        assert steps.state()["weight"].tolist() == [[-2.0], [0.0]]


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.Adam, lr=0.1)])
@pytest.mark.parametrize("slope", [1.0, torch.inf])
def test_masks_keep_weights_bit_for_bit(optimizer, slope):
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[0.1, 0.7], [-0.3, -0.0]])
    source = TensorSource(torch.ones(1, 2), torch.tensor([0]), "train", passed=True)
    problem = make_problem(model, [source])
    mask = torch.tensor([[False, True], [True, False]])
    steps = Descent(problem, {}, optimizer, {"weight": mask})
    for _ in range(3):
        # An infinite slope is what half precisions give where a sum overflows.
        steps.step(
            parts_of(problem, 0), lambda batch, rows, output: (slope * output.square()).sum()
        )
    new = steps.state()["weight"]
    assert torch.equal(new[~mask].view(torch.int32), model.weight.detach()[~mask].view(torch.int32))
    assert (new[mask] != model.weight.detach()[mask]).all()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_over_all_ranks_each_row_of_a_mini_batch_comes_once(sizes, batch_size, world_size, seed):
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    whole = [numbers(*range(10 * k, 10 * k + size), split=f"{k}") for k, size in enumerate(sizes)]
    value = torch.cat([source.inputs.flatten() for source in whole])
    batches = [torch.randperm(n, generator=generator)[:size] for size in (n, n // 2, 0)]
    problem = make_problem(two_weights(), whole)
    got = [[] for _ in batches]
    for rank in range(world_size):
        share = replace(problem, known=shares(whole, rank, world_size, batch_size))
        for at, parts in enumerate(load_batches(share, batches)):
            for batch, rows in parts:
                assert len(rows) <= batch_size
                assert torch.equal(batch.args[0].flatten(), value[rows])
                got[at] += rows.tolist()
    assert [sorted(rows) for rows in got] == [sorted(batch.tolist()) for batch in batches]


STATES = ({"weight": torch.tensor([[10.0], [0.0]])}, {})


WHICH = torch.tensor([0, 1, 0, 1])


def test_each_sample_is_asked_of_its_own_teacher():
    problem = make_problem(two_weights(), [numbers(1, 2, 3), numbers(4, split="new")])
    passes = []
    problem.model.register_forward_hook(lambda module, args, output: passes.append(output))
    teacher = Teacher(problem, STATES, WHICH)
    (train, rows), (new, last) = parts_of(problem, 0, 1, 2, 3)
    assert teacher(train, rows).tolist() == [[10.0, 0.0], [2.0, 0.0], [30.0, 0.0]]
    assert teacher(new, last).tolist() == [[4.0, 0.0]]
    assert not teacher(new, last).requires_grad
    # A cached answer takes no pass.
    n_passes = len(passes)
    assert teacher(train, rows).tolist() == [[10.0, 0.0], [2.0, 0.0], [30.0, 0.0]]
    assert len(passes) == n_passes


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


@pytest.mark.parametrize("most", [1, 20])
def test_a_step_that_does_not_fit_is_made_of_smaller_passes(most):
    whole = stepped(make_problem(trained(), known()))
    small = stepped(make_problem(trained(), known(), task=Cramped(most)))
    assert not same(whole, snapshot(trained()))
    for name, value in whole.items():
        torch.testing.assert_close(small[name], value)


def test_a_sample_that_does_not_fit_ends_the_steps_and_changes_nothing():
    problem = make_problem(trained(), known(), task=Cramped(0))
    descent = Descent(problem, {}, partial(torch.optim.SGD, lr=0.01))
    (parts,) = load_batches(problem, [ROWS])
    with pytest.raises(DeviceMemoryError, match=r"single sample does not fit[\s\S]*HINT"):
        descent.step(parts, loss)
    assert same(
        descent.state(), {name: value.detach() for name, value in problem.model.named_parameters()}
    )


def test_where_one_rank_runs_out_all_stop():
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


def test_a_polish_scales_back():
    problem = make_problem(trained(), known(), task=Cramped(0))
    new = {
        name: value + 0.3 * torch.randn(value.shape)
        for name, value in problem.model.state_dict().items()
    }
    assert problem.propose("new", new).broken > 0
    polished = polish(problem, new)
    assert (polished.broken, polished.rounds) == (0, 0)
    assert 0 <= polished.strength < 1
    assert math.isfinite(polished.value)


def results(problem: Problem) -> dict[str, Any]:
    polished = polish(problem, barely(problem, retrained(problem.model)))
    moved = Apricot([retrained(problem.model, seed) for seed in range(2)], rate=0.005)(problem)
    return {
        "fit": distilled(problem).state,
        "polish": dict(polished.state),
        "counts": (polished.repaired, polished.broken, polished.rounds, polished.strength),
        "apricot": dict(moved.proposal.state),
        "moves": [(step.name, step.repaired, step.broken, step.note) for step in moved.steps],
    }


def work(folder: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    collective = Collective.current(torch.device("cpu"))
    problem = make_problem(trained(normed), shares(known(), rank, 2), collective=collective)
    torch.save(results(problem), f"{folder}/{rank}.pt")


def test_both_ranks_have_the_weights_and_counts_of_one_process(tmp_path):
    in_two_processes(work, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    problem = make_problem(trained(normed), known())
    alone = results(problem)
    for part in ("fit", "polish", "apricot"):
        assert same(first[part], second[part])
        for name, value in alone[part].items():
            torch.testing.assert_close(first[part][name], value, rtol=1e-3, atol=1e-4)
    # How far a move goes is known from what all samples do, the same on every rank.
    assert same(first["apricot"], alone["apricot"])
    assert first["counts"] == second["counts"] == alone["counts"]
    assert first["moves"] == second["moves"] == alone["moves"]
    assert alone["counts"][1] == 0 < alone["counts"][2]
    assert broken(problem, first["polish"]) == broken(problem, second["apricot"]) == 0
