"""Mini-batches over splits and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor
from toy_problems import make_problem, shares
from two_weights import numbers, parts_of, two_weights

from lightning_nrl import TensorSource
from lightning_nrl.data.batch import Batch
from lightning_nrl.methods._solvers.mini_batches import load_batches, merge_measurements, shuffled_batches


@pytest.mark.parametrize(("n", "sizes"), [(0, []), (1, [1]), (4, [4]), (5, [3, 2]), (10, [4, 3, 3])])
def test_mini_batches_are_of_about_the_same_size(n: int, sizes: list[int]) -> None:
    rows = torch.arange(100, 100 + n)
    dealt = shuffled_batches(rows, torch.Generator().manual_seed(0), size=4)
    assert [len(batch) for batch in dealt] == sizes
    assert sorted(torch.cat([torch.zeros(0, dtype=torch.int64), *dealt]).tolist()) == rows.tolist()


def test_the_order_is_random_and_that_of_the_generator() -> None:
    rows = torch.arange(50)
    one, again, other = (torch.cat(shuffled_batches(rows, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, rows)


def test_parts_hold_the_samples_of_their_rows() -> None:
    few, many = numbers(1, 2, 3, batch_size=2), numbers(4, 5, 6, split="new", batch_size=3)
    problem = make_problem(two_weights(), [few, many])
    drawn = list(
        load_batches(problem, [torch.tensor([4, 0, 2, 1]), torch.tensor([5, 3, 4]), torch.zeros(0, dtype=torch.int64)])
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
        for at, parts in enumerate(load_batches(own, batches)):
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
        merge_measurements(problem, column, found), torch.tensor([0.0, torch.nan, torch.nan, 5.0]), equal_nan=True
    )
    torch.testing.assert_close(merge_measurements(problem, column, []), column, equal_nan=True)
    assert column.tolist()[3] == 3.0


def test_measured_is_the_same_on_every_rank() -> None:
    problem = make_problem(two_weights(), [numbers(1)])

    def run(collective: Any) -> Tensor:
        own = replace(problem, evaluator=replace(problem.evaluator, collective=collective))
        mine = [(torch.tensor([collective.rank]), torch.tensor([10.0 + collective.rank]))]
        return merge_measurements(own, torch.tensor([0.0, 1.0, 2.0]), mine if collective.rank < 2 else [])

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
