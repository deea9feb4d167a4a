from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_nrl._trainer.loaders import SeededDataset
from lightning_nrl._utils.preserve import seed_all


def from_torch() -> float:
    return float(torch.rand(()))


def from_numpy() -> float:
    return float(np.random.rand())


def from_random() -> float:
    return random.random()


class Drawn(Dataset):
    """Eight numbers, those at some positions drawn by a function; notes which are read."""

    def __init__(self, draw: Callable[[], float], positions: range = range(8)) -> None:
        self.draw, self.positions = draw, positions
        self.read: list[int] = []

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> float:
        self.read.append(i)
        return self.draw() if i in self.positions else float(i)


DRAWS = pytest.mark.parametrize("draw", [from_torch, from_numpy, from_random])


@DRAWS
def test_a_draw_depends_on_seed_and_position_alone(draw: Callable[[], float]) -> None:
    first = SeededDataset(Drawn(draw), 3).__getitems__(range(8))
    assert len(set(first)) == 8
    other = SeededDataset(Drawn(draw), 3)
    assert [other[i] for i in reversed(range(8))] == first[::-1]
    assert SeededDataset(Drawn(draw), 4)[0] != first[0]


@DRAWS
def test_later_positions_are_other_draws_of_the_same_samples(draw: Callable[[], float]) -> None:
    data = SeededDataset(Drawn(draw, range(1, 8)), 3)
    several = data.__getitems__([0, 1, 8, 9, 17])
    assert several[0] == several[2] == 0.0
    assert len({several[1], several[3], several[4]}) == 3
    assert data.__getitems__([17, 1])[::-1] == [several[1], several[4]]


@DRAWS
def test_samples_that_draw_are_noticed_wherever_they_are(draw: Callable[[], float]) -> None:
    data = SeededDataset(Drawn(draw, range(1, 8, 2)), 3)
    assert data.__getitems__([0, 2]) == [0.0, 2.0]
    assert not data.draws
    assert data.__getitems__([4, 5])[0] == 4.0
    assert data.draws
    assert data[5] == SeededDataset(Drawn(draw), 3)[5]


@DRAWS
def test_the_global_generators_are_as_found(draw: Callable[[], float]) -> None:
    seed_all(0)
    expected = from_torch(), from_numpy(), from_random()
    seed_all(0)
    SeededDataset(Drawn(draw), 3).__getitems__([0, 1])
    assert (from_torch(), from_numpy(), from_random()) == expected


def test_the_global_generators_are_as_found_after_an_error() -> None:
    def fails() -> float:
        torch.rand(())
        raise RuntimeError("no such file")

    data = SeededDataset(Drawn(fails), 3)
    data.draws = True
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no such file"):
        data[0]
    assert torch.equal(torch.get_rng_state(), expected)


def test_what_draws_nothing_is_read_once() -> None:
    data = Drawn(from_torch, range(0))
    assert SeededDataset(data, 3).__getitems__([6, 2]) == [6.0, 2.0]
    assert data.read == [6, 2]


class InBatches(Drawn):
    def __getitems__(self, index: list[int]) -> list[Any]:
        return [-self[i] for i in index]


def test_the_data_sets_own_batches_are_read_where_nothing_is_drawn() -> None:
    assert SeededDataset(InBatches(from_torch, range(0)), 3).__getitems__([6, 2]) == [-6.0, -2.0]
    drawn = SeededDataset(InBatches(from_torch), 3)
    assert drawn.__getitems__([6, 2]) == [drawn[6], drawn[2]]
    assert drawn[6] > 0


def test_a_copy_for_a_worker_gives_the_same_samples() -> None:
    data = SeededDataset(Subset(Drawn(from_numpy), [5, 1]), 3)
    again = pickle.loads(pickle.dumps(data))
    assert len(again) == 2
    assert again.__getitems__([1, 0]) == [data[1], data[0]]


def test_tensors_are_given_as_they_are() -> None:
    x = torch.arange(3)
    assert SeededDataset(TensorDataset(x), 0).__getitems__([2, 0]) == [(torch.tensor(2),), (torch.tensor(0),)]
