from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_package import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
)

from lightning_nrl import ConfigurationError
from lightning_nrl._trainer.loaders import LoaderSource, check_loader, make_source
from lightning_nrl.data.batch import Batch


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


MODEL: Any = SimpleNamespace(_on_before_batch_transfer=same, forward=same)


def numbers(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(n) * 10, torch.arange(n) % 3)


def source(loader: Any, rank: int = 0, world_size: int = 1, **arguments: Any) -> LoaderSource:
    return make_source(loader, "train", trainer=rank_of(rank, world_size), model=MODEL, **arguments)


def read(source: LoaderSource) -> list[Batch]:
    return list(source)


def test_a_loader_is_read_in_order_with_nothing_dropped() -> None:
    batches = read(source(DataLoader(numbers(7), batch_size=3, shuffle=True, drop_last=True)))
    assert [batch.args[0].tolist() for batch in batches] == [[0, 10, 20], [30, 40, 50], [60]]
    assert [batch.target.tolist() for batch in batches] == [[0, 1, 2], [0, 1, 2], [0]]
    assert [batch.position.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]


@given(n=st.integers(1, 40), world_size=st.integers(1, 5), batch_size=st.integers(1, 9), step=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_the_ranks_read_every_sample_of_a_subset_once(n: int, world_size: int, batch_size: int, step: int) -> None:
    chosen = list(range(0, n, step))
    loader = DataLoader(numbers(n), batch_size, sampler=SubsetRandomSampler(chosen))
    found = []
    for rank in range(world_size):
        share = source(loader, rank, world_size)
        assert share.index.tolist() == chosen
        for batch in share:
            assert len(batch) <= batch_size
            assert (batch.args[0] // 10).tolist() == share.index[batch.position].tolist()
            found += batch.position.tolist()
    assert sorted(found) == list(range(len(chosen)))


SUBSET = SubsetRandomSampler([6, 2, 4])
SAMPLERS = {
    "in batches": {"batch_sampler": BatchSampler(SUBSET, 2, drop_last=True)},
    "wrapped by Lightning": {"sampler": DistributedSamplerWrapper(SUBSET, num_replicas=2, rank=1), "batch_size": 2},
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_subset_sampler_is_found_where_it_is_wrapped(kind: str) -> None:
    assert source(DataLoader(numbers(9), **SAMPLERS[kind])).index.tolist() == [2, 4, 6]


def test_a_padded_share_of_the_data_is_not_taken_for_the_data() -> None:
    sampler = DistributedSampler(numbers(9), num_replicas=2, rank=1)
    assert source(DataLoader(numbers(9), 2, sampler=sampler)).index.tolist() == list(range(9))


def test_a_limit_counts_batches() -> None:
    assert source(DataLoader(numbers(9), 2), limit=2).index.tolist() == [0, 1, 2, 3]


class Noisy(Dataset):
    """Six samples, with noise from each of the global generators."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        return torch.rand(2) + torch.from_numpy(np.random.rand(2)) + random.random(), i


def rows(batches: list[Batch]) -> dict[int, list[float]]:
    """The inputs of each sample by its place."""
    return {i: row.tolist() for b in batches for i, row in zip(b.position.tolist(), b.args[0], strict=True)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_the_same_in_every_pass_order_and_batch(workers: int) -> None:
    noisy = source(DataLoader(Noisy(), 2, num_workers=workers), seed=5)
    first = rows(read(noisy))
    assert len({tuple(row) for row in first.values()}) == 6
    assert rows(read(noisy)) == first
    assert rows(read(source(DataLoader(Noisy(), 6), seed=5))) == first
    assert rows(list(noisy.draw([torch.tensor([4, 1, 0]), torch.tensor([5, 1])]))) == {
        i: first[i] for i in (0, 1, 4, 5)
    }
    other = rows(read(source(DataLoader(Noisy(), 6, num_workers=workers), seed=6)))
    assert all(other[i] != first[i] for i in first)


def test_a_data_set_given_twice_has_two_draws_of_each_sample() -> None:
    data = Noisy()
    twice = source(DataLoader(ConcatDataset([data, data]), 4))
    assert len({tuple(row) for row in rows(read(twice)).values()}) == 12
    assert twice.identity[:6].tolist() == twice.identity[6:].tolist()


def test_what_is_read_leaves_the_data_set_and_its_identity_as_the_user_made_them() -> None:
    data = Noisy()
    noisy = source(DataLoader(data, 2))
    assert noisy.loader.dataset is data
    assert noisy.identity.tolist() == [[id(data), i] for i in range(6)]


class Wrapped(Dataset):
    """Each sample says of which class its worker's data set is, and what the worker's start has left there."""

    mark = 0

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Any:
        info = get_worker_info()
        assert info is not None
        return isinstance(info.dataset, Wrapped), self.mark


def leave_mark(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.mark = 7


def test_the_start_of_a_worker_gets_the_users_data_set() -> None:
    (batch,) = read(source(DataLoader(Wrapped(), 2, num_workers=1, worker_init_fn=leave_mark)))
    assert batch.args[0].tolist() == [True, True]
    assert batch.target.tolist() == [7, 7]


def test_one_loader_in_a_list_or_mapping_is_that_loader() -> None:
    loader = DataLoader(numbers(3))
    assert check_loader([loader], "val") is check_loader({"a": [loader]}, "val") is loader


def test_what_is_no_loader_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="`val` data: found TensorDataset, not a DataLoader"):
        check_loader(numbers(3), "val")
