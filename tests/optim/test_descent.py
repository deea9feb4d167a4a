"""Steps that can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_problems import left_alone, make_problem, normed, same, together
from toy_repairs import known
from two_weights import SGD, first_logit, numbers, parts_of, two_weights

from lightning_nrl import TensorSource
from lightning_nrl._utils.state import holding, snapshot
from lightning_nrl.data.batch import Batch
from lightning_nrl.evaluation.layer_gradients import margin_calls
from lightning_nrl.methods import Problem
from lightning_nrl.methods._solvers.descent import Descent
from lightning_nrl.methods._solvers.mini_batches import load_batches


def test_a_plain_step_by_hand() -> None:
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


def test_a_step_is_on_samples_of_several_splits_and_batches() -> None:
    problem = make_problem(two_weights(), [numbers(1, 2, batch_size=1), numbers(4, split="new")])
    steps = Descent(problem, {}, SGD)
    parts = parts_of(problem, 0, 1, 2)
    assert [rows.tolist() for _, rows in parts] == [[0], [1], [2]]
    steps.step(parts, first_logit)
    torch.testing.assert_close(steps.state()["weight"], torch.tensor([[0.3], [0.0]]))


def test_a_step_without_samples_moves_nothing() -> None:
    problem = make_problem(two_weights(), [numbers(2)])
    steps = Descent(problem, {}, partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1))
    steps.step([], first_logit)
    assert steps.state()["weight"].tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5),
    ],
)
@pytest.mark.parametrize("slope", [1.0, torch.inf])
def test_masks_keep_weights_bit_for_bit(optimizer: Callable[..., Any], slope: float) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[0.1, 0.7], [-0.3, -0.0]])
    source = TensorSource(torch.ones(1, 2), torch.tensor([0]), "train", passed=True)
    problem = make_problem(model, [source])
    mask = torch.tensor([[False, True], [True, False]])
    steps = Descent(problem, {}, optimizer, {"weight": mask})
    for _ in range(3):
        # An infinite slope is what half precisions give where a sum overflows.
        steps.step(parts_of(problem, 0), lambda batch, rows, output: (slope * output.square()).sum())
    new = steps.state()["weight"]
    assert torch.equal(new[~mask].view(torch.int32), model.weight.detach()[~mask].view(torch.int32))
    assert (new[mask] != model.weight.detach()[mask]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_smaller_than_the_rounding_of_the_model_add_up(dtype: torch.dtype) -> None:
    problem = make_problem(two_weights(dtype), [numbers(1, dtype=dtype)])
    seen = []

    def loss(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
        seen.append((output.dtype, float(output[0, 0].detach())))
        return output[:, 0].sum()

    # Next to 1, float16 has 0.9995 and bfloat16 0.996.
    steps = Descent(problem, {}, partial(torch.optim.SGD, lr=1e-4))
    for _ in range(100):
        steps.step(parts_of(problem, 0), loss)
    assert steps.state()["weight"].dtype == dtype
    assert float(steps.state()["weight"][0]) == pytest.approx(0.99, abs=4e-3)
    assert float(steps.state()["weight"][0]) < 1
    assert seen[:2] == [(dtype, 1.0)] * 2
    assert seen[-1][1] < 1


def test_it_starts_from_a_state_and_what_that_has_beyond_the_scope_stays() -> None:
    model = normed()
    problem = make_problem(model, known(), layer="4")
    new = {name: value + 1 for name, value in snapshot(model).items()}
    given = {name: new[name] for name in ("0.weight", "1.running_mean", "1.num_batches_tracked", "4.bias")}
    steps = Descent(problem, given, SGD)
    assert problem.scope == ("4.weight", "4.bias")
    assert same(
        steps.state(),
        {**{k: given[k] for k in list(given)[:3]}, "4.weight": model[4].weight.detach(), "4.bias": new["4.bias"]},
    )
    batch, rows = parts_of(problem, 0, 1)[0]
    with holding(model, given), torch.no_grad():
        expected = model(*batch.args)
    with left_alone(model):
        with steps.running():
            assert torch.equal(model(*batch.args), expected)
        steps.step([(batch, rows)], first_logit)
    after = steps.state()
    assert same({k: after[k] for k in list(given)[:3]}, {k: given[k] for k in list(given)[:3]})
    assert torch.equal(after["4.bias"], new["4.bias"] - torch.tensor([0.2, 0.0, 0.0]))
    assert given["4.bias"] is not after["4.bias"]


def test_only_the_scope_moves() -> None:
    model = normed()
    model[0].bias.requires_grad_(False)
    problem = make_problem(model, known())
    steps = Descent(problem, {}, partial(torch.optim.Adam, lr=0.1))
    with left_alone(model):
        steps.step(parts_of(problem, *range(40)), first_logit)
    assert set(steps.state()) == {"0.weight", "1.weight", "1.bias", "4.weight", "4.bias"}
    assert not torch.equal(steps.state()["1.bias"], model[1].bias)


class Tied(nn.Module):
    """The same weights, twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.first.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight.data = torch.eye(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_weights_under_two_names_move_as_one(name: str) -> None:
    model = Tied()
    source = TensorSource(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), "train", passed=True)
    problem = make_problem(model, [source], scope=("first.weight",))
    steps = Descent(problem, {name: torch.tensor([[3.0, 0.0], [0.0, 2.0]])}, SGD)
    # The first logit is w00 w00 + w01 w10, its slopes are 6 for w00, w10 = 0 for w01 and w01 = 0 for w10.
    with left_alone(model):
        steps.step(parts_of(problem, 0), first_logit)
    assert set(steps.state()) == {"first.weight"}
    torch.testing.assert_close(steps.state()["first.weight"], torch.tensor([[2.4, 0.0], [0.0, 2.0]]))


def test_ranks_sum_their_gradients_also_where_some_have_none() -> None:
    def work(problem: Problem) -> Tensor:
        steps = Descent(problem, {}, SGD)
        steps.step(parts_of(problem, 0, 1), first_logit)
        steps.step(parts_of(problem, 1), first_logit)
        return steps.state()["weight"]

    for weight in together(two_weights(), [numbers(2, 3)], work):
        torch.testing.assert_close(weight, torch.tensor([[1 - 0.5 - 0.3], [0.0]]))


class Half(nn.Module):
    """A layer whose output is not used, beside one that is, in two precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(1, 2, bias=False, dtype=torch.float64)
        self.unused = nn.Linear(1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x.double())


def test_weights_that_no_loss_depends_on_stay_on_any_number_of_ranks() -> None:
    torch.manual_seed(0)
    model = Half()

    def work(problem: Problem) -> dict[str, Tensor]:
        steps = Descent(problem, {}, partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
        steps.step(parts_of(problem, 0, 1), first_logit)
        return steps.state()

    alone = work(make_problem(model, [numbers(2, 3)]))
    first, second = together(model, [numbers(2, 3)], work)
    assert torch.equal(alone["unused.weight"], model.unused.weight.detach())
    assert same(first, second)
    assert same(first, alone)


class Recurrent(nn.Module):
    """Asks, whenever it runs, how cuDNN is set."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)
        self.asked: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append((torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic))
        return self.head(self.inner(x[:, None])[0][:, 0])


def test_gradients_are_repeatable_and_those_of_recurrent_layers_are_taken_without_cudnn() -> None:
    problem = make_problem(Recurrent(), known())
    descent = Descent(problem, {}, partial(torch.optim.SGD, lr=0.1))
    rows = torch.arange(5)
    (parts,) = load_batches(problem, [rows])
    descent.step(parts, lambda batch, rows, output: output.square().sum())
    assert problem.model.asked[-1] == (False, True)
    margin_calls(
        problem.model, {"head": problem.model.head}, parts[0][0], problem.evaluator.task, problem.evaluator.context
    )
    assert problem.model.asked[-1] == (False, True)
    problem.evaluate({})
    assert problem.model.asked[-1] == (True, False)
