"""Data of a trainer read again: in order, each sample once, the same in every pass; known data kept
from others.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_package import LightningModule, Trainer
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
)

from lightning_nrl import ConfigurationError
from lightning_nrl._trainer.reading.data_splits import DataOptions, DataRequest, SplitLoaders
from lightning_nrl._trainer.reading.loaders import LoaderSource, SeededDataset, make_source
from lightning_nrl._utils.preserve import seed_all
from lightning_nrl.data.batch import Batch
from lightning_nrl.data.sample_identity import is_among


def same(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def rank_of(rank: int, world_size: int) -> Any:
    """As much of a trainer as reading data needs."""
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        precision_plugin=SimpleNamespace(convert_input=same),
        strategy=SimpleNamespace(batch_to_device=same),
    )


MODEL = SimpleNamespace(_on_before_batch_transfer=same, forward=same)


def numbers(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(n) * 10, torch.arange(n) % 3)


def source(loader: Any, rank: int = 0, world_size: int = 1, **arguments: Any) -> LoaderSource:
    return make_source(loader, "train", trainer=rank_of(rank, world_size), model=MODEL, **arguments)


def test_a_loader_is_read_in_order_with_nothing_dropped():
    batches = list(source(DataLoader(numbers(7), batch_size=3, shuffle=True, drop_last=True)))
    assert [batch.args[0].tolist() for batch in batches] == [[0, 10, 20], [30, 40, 50], [60]]
    assert [batch.target.tolist() for batch in batches] == [[0, 1, 2], [0, 1, 2], [0]]
    assert [batch.position.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]


@given(
    n=st.integers(1, 40),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 9),
    step=st.integers(1, 4),
)
@settings(max_examples=50, deadline=None)
def test_the_ranks_read_every_sample_of_a_subset_once(n, world_size, batch_size, step):
    chosen = list(range(0, n, step))
    loader = DataLoader(numbers(n), batch_size, sampler=SubsetRandomSampler(chosen))
    positions = []
    for rank in range(world_size):
        share = source(loader, rank, world_size)
        assert share.index.tolist() == chosen
        for batch in share:
            assert len(batch) <= batch_size
            assert (batch.args[0] // 10).tolist() == share.index[batch.position].tolist()
            positions += batch.position.tolist()
    assert sorted(positions) == list(range(len(chosen)))


class Noisy(Dataset):
    """Six samples, with noise from each of the global generators."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        return torch.rand(2) + torch.from_numpy(np.random.rand(2)) + random.random(), i


def rows(batches: list[Batch]) -> dict[int, list[float]]:
    """The inputs of each sample by its place."""
    return {
        i: row.tolist()
        for b in batches
        for i, row in zip(b.position.tolist(), b.args[0], strict=True)
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_the_same_in_every_pass_order_and_batch(workers):
    noisy = source(DataLoader(Noisy(), 2, num_workers=workers), seed=5)
    first = rows(list(noisy))
    assert len({tuple(row) for row in first.values()}) == 6
    assert rows(list(noisy)) == first
    assert rows(list(source(DataLoader(Noisy(), 6), seed=5))) == first
    assert rows(list(noisy.draw([torch.tensor([4, 1, 0]), torch.tensor([5, 1])]))) == {
        i: first[i] for i in (0, 1, 4, 5)
    }
    reseeded = rows(list(source(DataLoader(Noisy(), 6, num_workers=workers), seed=6)))
    assert all(reseeded[i] != first[i] for i in first)


class Wrapped(Dataset):
    """Each sample says of which class its worker's data set is, and what the worker's start has
    left there.
    """

    mark = 0

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Any:
        info = get_worker_info()
        return isinstance(info.dataset, Wrapped), self.mark


def leave_mark(worker_id: int) -> None:
    info = get_worker_info()
    info.dataset.mark = 7


@pytest.mark.parametrize(
    "data",
    [
        numbers(9),
        Subset(numbers(9), [8, 0, -5, 2]),
        Subset(numbers(9), torch.tensor([8, 0, 4, 2])),
        TensorDataset(torch.randn(4, 2, 3)),
        TensorDataset(torch.eye(4).to_sparse()),
    ],
)
def test_samples_read_at_once_are_those_read_one_by_one(data):
    index = [3, 0, 3, 1]
    for together, alone in zip(SeededDataset(data, 0).__getitems__(index), index, strict=True):
        assert type(together) is tuple
        for x, y in zip(together, data[alone], strict=True):
            assert torch.equal(x.to_dense(), y.to_dense())


def test_the_start_of_a_worker_gets_the_users_data_set():
    (batch,) = list(source(DataLoader(Wrapped(), 2, num_workers=1, worker_init_fn=leave_mark)))
    assert batch.args[0].tolist() == [True, True]
    assert batch.target.tolist() == [7, 7]


def from_torch() -> float:
    return float(torch.rand(()))


def from_numpy() -> float:
    return float(np.random.rand())


class Drawn(Dataset):
    """Eight numbers, those at some positions drawn by a function."""

    def __init__(self, draw: Callable[[], float], positions: range = range(8)) -> None:
        self.draw, self.positions = draw, positions

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> float:
        return self.draw() if i in self.positions else float(i)


@pytest.mark.parametrize("draw", [from_torch, from_numpy, random.random])
def test_a_draw_depends_on_seed_and_position_alone(draw):
    first = SeededDataset(Drawn(draw), 3).__getitems__(range(8))
    assert len(set(first)) == 8
    again = SeededDataset(Drawn(draw), 3)
    seed_all(0)
    expected = draw()
    seed_all(0)
    assert [again[i] for i in reversed(range(8))] == first[::-1]
    assert draw() == expected
    assert SeededDataset(Drawn(draw), 4)[0] != first[0]
    partly = SeededDataset(Drawn(draw, range(1, 8, 2)), 3)
    assert partly.__getitems__([0, 2]) == [0.0, 2.0]
    assert not partly.draws
    assert partly.__getitems__([4, 5]) == [4.0, first[5]]
    assert partly.draws


DATA = TensorDataset(torch.arange(20.0)[:, None], torch.zeros(20))
OTHER = TensorDataset(torch.arange(100.0, 110.0)[:, None], torch.zeros(10))
FAILED = DataLoader(TensorDataset(torch.zeros(3, 1), torch.zeros(3)), 4)


class Jittered(Dataset):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        x, y = self.data[i]
        return x + torch.rand(1), y


WAYS = {
    "overlapping subsets that augment": (
        Jittered(Subset(DATA, range(10))),
        Jittered(Subset(DATA, range(8, 14))),
        2,
    ),
    "the whole and a part": (DATA, Subset(DATA, [3, 5]), 2),
    "a union": (Subset(DATA, range(10)), ConcatDataset([OTHER, Subset(DATA, [2])]), 1),
    "a part of a union": (DATA, Subset(ConcatDataset([OTHER, DATA]), [9, 10, 11]), 2),
}


@pytest.fixture(scope="module")
def loaders() -> SplitLoaders:
    return SplitLoaders(Trainer(logger=False, enable_checkpointing=False), LightningModule())


@pytest.mark.parametrize("way", WAYS)
def test_held_out_data_that_are_known_too_are_found(way, loaders):
    known, held_out, common = WAYS[way]
    options = DataOptions(DataLoader(known, 4), FAILED)
    with pytest.raises(
        ConfigurationError, match=f"`calibration`: {common} of its {len(held_out)} samples are in"
    ):
        DataRequest(options, calibration=DataLoader(held_out, 4)).find(loaders)
    request = DataRequest(options, unseen=DataLoader(held_out, 4))
    if common == len(held_out):
        with pytest.raises(
            ConfigurationError, match="`unseen`: 2 of its 2 samples are in `passed` too"
        ):
            request.find(loaders)
    else:  # what is common is left out where unseen data are counted
        [passed], _, [unseen], _ = request.find(loaders)
        assert int(is_among(unseen.identity(), passed.identity()).sum()) == common


def test_a_sampler_says_which_samples_are_meant(loaders):
    first = DataLoader(DATA, 4, sampler=SubsetRandomSampler(range(10)))
    second = DataLoader(DATA, 4, sampler=SubsetRandomSampler(range(10, 20)))
    *_, calibration = DataRequest(DataOptions(first, FAILED), calibration=second).find(loaders)
    assert calibration == [(second, "calibration")]


def test_two_loaders_of_the_same_samples_are_one_split(loaders):
    def known(passed: Any, failed: Any) -> list[LoaderSource]:
        options = DataOptions(DataLoader(passed, 4), DataLoader(failed, 4))
        return DataRequest(options).sources(loaders, seed=0, limit=None)[0]

    (source,) = known(Subset(DATA, [4, 6]), Subset(DATA, [4, 6]))
    assert (source.passed, source.failed, len(source.index)) == (True, True, 2)
    assert [source.split for source in known(Jittered(DATA), DATA)] == ["passed", "failed"]
