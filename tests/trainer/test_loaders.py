from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, SubsetRandomSampler, TensorDataset

from lightning_nrl import ConfigurationError
from lightning_nrl._trainer.loaders import LoaderSource, check_loader, make_source, warn_if_random
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


MODEL: Any = SimpleNamespace(_on_before_batch_transfer=same)


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
    """Three samples, with noise from each of the global generators."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        return torch.rand(2) + torch.from_numpy(np.random.rand(2)) + random.random(), i


@pytest.mark.parametrize("workers", [0, 1])
def test_every_pass_sees_the_same_noise(workers: int) -> None:
    noisy = source(DataLoader(Noisy(), 3, num_workers=workers), seed=5)
    (first,), (second,) = read(noisy), read(noisy)
    assert torch.equal(first.args[0], second.args[0])
    (other,) = read(source(DataLoader(Noisy(), 3, num_workers=workers), seed=6))
    assert not torch.equal(first.args[0], other.args[0])


class Samples(list):
    pass


@pytest.mark.parametrize(
    "sample",
    [
        (torch.tensor([1.0, torch.nan]), 3),
        {"image": np.array([1, 2]), "text": "seven", "none": None, "nan": float("nan")},
        ([torch.ones(2), "a"], (1, 2.0)),
    ],
)
def test_data_that_stay_the_same_are_not_warned_of(sample: Any, recwarn: pytest.WarningsRecorder) -> None:
    warn_if_random([source(DataLoader(Samples([sample]), 1))])
    assert not recwarn


def test_data_that_change_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="`train` data: reading a sample twice gives two different samples"):
        warn_if_random([source(DataLoader(Noisy(), 1))])


def test_one_loader_in_a_list_or_mapping_is_that_loader() -> None:
    loader = DataLoader(numbers(3))
    assert check_loader([loader], "val") is check_loader({"a": [loader]}, "val") is loader


def test_what_is_no_loader_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="`val` data: found TensorDataset, not a DataLoader"):
        check_loader(numbers(3), "val")
