"""Steps, teachers and mini-batches that can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor, nn
from toy_problems import Share, left_alone, make_problem, normed, same, shares, together
from toy_repairs import known

from lightning_nrl import TensorSource
from lightning_nrl._model.margin_grad import trace
from lightning_nrl._optim import descent as module
from lightning_nrl._optim.descent import Descent, Teacher, deal, draw, measured, outputs
from lightning_nrl._utils.state import holding, snapshot
from lightning_nrl.data.batch import Batch
from lightning_nrl.problem import Problem

SGD = partial(torch.optim.SGD, lr=0.1)


def two_weights(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Logits x and 0."""
    model = nn.Linear(1, 2, bias=False, dtype=dtype)
    model.weight.data = torch.tensor([[1.0], [0.0]], dtype=dtype)
    return model


def numbers(*x: float, split: str = "train", batch_size: int = 256, dtype: torch.dtype = torch.float32) -> TensorSource:
    """Samples of class 0."""
    inputs = torch.tensor(x, dtype=dtype)[:, None]
    return TensorSource(inputs, torch.zeros(len(x), dtype=torch.int64), split, True, True, batch_size=batch_size)


def parts_of(problem: Problem, *rows: int) -> list[tuple[Batch, Tensor]]:
    (parts,) = draw(problem, [torch.tensor(rows)])
    return parts


def first_logit(batch: Batch, rows: Tensor, output: Tensor) -> Tensor:
    return output[:, 0].sum()


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


def teacher_problem(**rest: Any) -> tuple[Problem, list[int]]:
    """With weights w, the logits are w x and 0; the runs of the model are counted."""
    problem, runs = make_problem(two_weights(), [numbers(1, 2, 3), numbers(4, split="new")], **rest), []
    problem.model.register_forward_hook(lambda module, args, output: runs.append(len(args[0])))
    return problem, runs


STATES = ({"weight": torch.tensor([[10.0], [0.0]])}, {})
WHICH = torch.tensor([0, 1, 0, 1])


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
    (parts,) = draw(problem, [rows])
    descent.step(parts, lambda batch, rows, output: output.square().sum())
    assert problem.model.asked[-1] == (False, True)
    trace(problem.model, {"head": problem.model.head}, parts[0][0], problem.task, problem.context)
    assert problem.model.asked[-1] == (False, True)
    problem.evaluate({})
    assert problem.model.asked[-1] == (True, False)


def test_each_sample_is_asked_of_its_own_teacher() -> None:
    problem, _ = teacher_problem()
    teacher = Teacher(problem, STATES, WHICH)
    (train, rows), (new, last) = parts_of(problem, 0, 1, 2, 3)
    assert teacher(train, rows).tolist() == [[10.0, 0.0], [2.0, 0.0], [30.0, 0.0]]
    assert teacher(new, last).tolist() == [[4.0, 0.0]]
    assert not teacher(new, last).requires_grad


@pytest.mark.parametrize(("room", "again"), [(2**20, []), (0, [2, 2])])
def test_what_was_said_is_remembered_where_there_is_room(
    room: int, again: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMEMBERED", room)
    problem, runs = teacher_problem()
    teacher = Teacher(problem, STATES, WHICH)
    batch, rows = parts_of(problem, 2, 1)[0]
    said = teacher(batch, rows)
    assert said.tolist() == [[30.0, 0.0], [2.0, 0.0]]
    assert runs == [2, 2]
    runs.clear()
    assert torch.equal(teacher(batch, rows), said)
    assert runs == again
    # Row 0 was not asked before.
    batch, rows = parts_of(problem, 1, 0)[0]
    assert teacher(batch, rows).tolist() == [[2.0, 0.0], [10.0, 0.0]]


def test_only_those_are_asked_that_were_not_asked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, runs = teacher_problem()
    teacher = Teacher(problem, STATES, WHICH)
    teacher.prepare(torch.arange(4))
    assert runs == []  # how large their table is going to be, the first answer tells
    for batch, rows in parts_of(problem, 2, 1):
        teacher(batch, rows)
    runs.clear()
    teacher.prepare(torch.arange(4))
    assert sorted(runs) == [1, 1]
    runs.clear()
    teacher.prepare(torch.arange(4))
    said = [teacher(batch, rows) for batch, rows in parts_of(problem, 0, 1, 2, 3)]
    assert torch.cat(said)[:, 0].tolist() == [10.0, 2.0, 30.0, 4.0]
    assert runs == []


def test_a_teacher_is_not_confused_by_weights_that_are_being_moved() -> None:
    problem, _ = teacher_problem()
    teacher, steps = Teacher(problem, STATES, WHICH), Descent(problem, {}, SGD)
    batch, rows = parts_of(problem, 0, 1)[0]
    steps.step([(batch, rows)], first_logit)
    with steps.running():
        assert teacher(batch, rows).tolist() == [[10.0, 0.0], [2.0, 0.0]]
        torch.testing.assert_close(outputs(problem, batch), torch.tensor([[0.7, 0.0], [1.4, 0.0]]))


def test_outputs_are_computed_in_the_context_of_the_deployed_model() -> None:
    problem = make_problem(two_weights(), [numbers(1, 2)], context=lambda: torch.autocast("cpu", torch.bfloat16))
    batch, _ = parts_of(problem, 0)[0]
    assert outputs(problem, batch).dtype == torch.bfloat16


@pytest.mark.parametrize(("n", "sizes"), [(0, []), (1, [1]), (4, [4]), (5, [3, 2]), (10, [4, 3, 3])])
def test_mini_batches_are_of_about_the_same_size(n: int, sizes: list[int]) -> None:
    rows = torch.arange(100, 100 + n)
    dealt = deal(rows, torch.Generator().manual_seed(0), size=4)
    assert [len(batch) for batch in dealt] == sizes
    assert sorted(torch.cat([torch.zeros(0, dtype=torch.int64), *dealt]).tolist()) == rows.tolist()


def test_the_order_is_random_and_that_of_the_generator() -> None:
    rows = torch.arange(50)
    one, again, other = (torch.cat(deal(rows, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, rows)


def test_parts_hold_the_samples_of_their_rows() -> None:
    few, many = numbers(1, 2, 3, batch_size=2), numbers(4, 5, 6, split="new", batch_size=3)
    problem = make_problem(two_weights(), [few, many])
    drawn = list(
        draw(problem, [torch.tensor([4, 0, 2, 1]), torch.tensor([5, 3, 4]), torch.zeros(0, dtype=torch.int64)])
    )
    found = [[(b.args[0].flatten().tolist(), b.position.tolist(), rows.tolist()) for b, rows in p] for p in drawn]
    assert found == [
        [([1.0, 3.0], [0, 2], [0, 2]), ([2.0], [1], [1]), ([5.0], [1], [4])],
        [([6.0, 4.0, 5.0], [2, 0, 1], [5, 3, 4])],
        [],
    ]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_over_all_ranks_each_row_of_a_mini_batch_comes_once(
    sizes: list[int], batch_size: int, world_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    whole = [numbers(*range(10 * k, 10 * k + size), split=f"{k}") for k, size in enumerate(sizes)]
    value = torch.cat([source.inputs.flatten() for source in whole])
    batches = [torch.randperm(n, generator=generator)[:size] for size in (n, n // 2, 0)]
    problem = make_problem(two_weights(), whole)
    got: list[list[int]] = [[] for _ in batches]
    for rank in range(world_size):
        own = replace(problem, known=shares(whole, rank, world_size, batch_size))
        for at, parts in enumerate(draw(own, batches)):
            for batch, rows in parts:
                assert len(rows) <= batch_size
                assert torch.equal(batch.args[0].flatten(), value[rows])
                got[at] += rows.tolist()
    assert [sorted(rows) for rows in got] == [sorted(batch.tolist()) for batch in batches]


def test_measured_takes_the_last_of_several_values() -> None:
    problem = make_problem(two_weights(), [numbers(1)])
    column = torch.tensor([0.0, 1.0, torch.nan, 3.0])
    found = [(torch.tensor([3, 1]), torch.tensor([5.0, 6.0])), (torch.tensor([1]), torch.tensor([torch.nan]))]
    torch.testing.assert_close(
        measured(problem, column, found), torch.tensor([0.0, torch.nan, torch.nan, 5.0]), equal_nan=True
    )
    torch.testing.assert_close(measured(problem, column, []), column, equal_nan=True)
    assert column.tolist()[3] == 3.0


def test_measured_is_the_same_on_every_rank() -> None:
    problem = make_problem(two_weights(), [numbers(1)])

    def run(collective: Any) -> Tensor:
        own = replace(problem, evaluator=replace(problem.evaluator, collective=collective))
        mine = [(torch.tensor([collective.rank]), torch.tensor([10.0 + collective.rank]))]
        return measured(own, torch.tensor([0.0, 1.0, 2.0]), mine if collective.rank < 2 else [])

    assert [column.tolist() for column in on_ranks(3, run)] == [[10.0, 11.0, 2.0]] * 3


class Bare:
    """A split of a user's own that does not say how large its batches are."""

    split, passed, failed = "own", True, True

    def __init__(self, source: TensorSource) -> None:
        self.source, self.index, self.positions = source, source.index, source.positions

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.source)

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        return self.source.draw(batches)


def test_a_batch_is_read_where_its_size_is_not_said() -> None:
    problem = make_problem(two_weights(), [Bare(numbers(1, 2, 3, split="own", batch_size=2))])
    assert [rows.tolist() for _, rows in parts_of(problem, 2, 1, 0)] == [[2, 1], [0]]


def test_a_share_is_what_it_says() -> None:
    source = Share(torch.arange(5.0)[:, None], torch.zeros(5, dtype=torch.int64), "a", rank=1, world_size=2)
    assert [batch.args[0].flatten().tolist() for batch in source] == [[1.0, 3.0]]
