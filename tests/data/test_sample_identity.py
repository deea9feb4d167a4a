"""Samples that are the same: one place of one data set, or one content."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import Collective, on_ranks
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from toy_problems import Share

from lightning_nrl import TensorSource
from lightning_nrl.data import Batch
from lightning_nrl.data.batch import RecordingSource
from lightning_nrl.data.sample_identity import (
    base_samples,
    content_keys,
    content_recorder,
    gathered_keys,
    has_content_of,
    raw_recorder,
)

X = torch.arange(20.0).view(10, 2)
FIRST, SECOND = TensorDataset(X), TensorDataset(X + 100)


class Noisy(Dataset):
    """Augments another data set, or the samples of it that a list names, in order or backwards."""

    def __init__(self, data: Any, chosen: Any = None, backwards: bool = False) -> None:
        self.noise, self.data, self.chosen, self.backwards = 0.1, data, chosen, backwards

    def __len__(self) -> int:
        return len(self.data if self.chosen is None else self.chosen)

    def __getitem__(self, i: int) -> Any:
        place = i if self.chosen is None else self.chosen[i]
        (x,) = self.data[len(self) - 1 - place if self.backwards else place]
        return (x + self.noise * torch.randn(x.shape),)


def places(dataset: Dataset[Any], n: int) -> list[tuple[str, int]]:
    start = torch.zeros(1, dtype=torch.int64)
    known = {"first": FIRST, "second": SECOND}
    names = {int(base_samples(data, start)[0, 0]): name for name, data in known.items()}
    return [(names[key], at) for key, at in base_samples(dataset, torch.arange(n)).tolist()]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Subset(FIRST, [-1, 0]), [("first", 9), ("first", 0)]),
        (Subset(Subset(FIRST, [3, 5, 7]), [2, 0]), [("first", 7), ("first", 3)]),
        (Subset(ConcatDataset([FIRST, SECOND]), [9, 10]), [("first", 9), ("second", 0)]),
        (Subset(Noisy(Noisy(Subset(FIRST, [3, 5, 7]))), [2, 0]), [("first", 7), ("first", 3)]),
        (Noisy(FIRST, [5, 3, 4]), [("first", 5), ("first", 3), ("first", 4)]),
    ],
)
def test_subsets_and_unions_are_seen_through(dataset, expected):
    assert places(dataset, len(expected)) == expected


def test_samples_that_come_from_places_that_no_list_names_are_their_own():
    backwards = Noisy(FIRST, backwards=True)
    state = torch.get_rng_state()
    assert base_samples(backwards, torch.arange(10)).tolist() == [
        [id(backwards), i] for i in range(10)
    ]
    assert backwards.data is FIRST
    assert torch.equal(torch.get_rng_state(), state)


def keys(*args: Tensor, target: Tensor | None = None, **kwargs: Tensor) -> list[list[int]]:
    n = len([*args, *kwargs.values()][0])
    return content_keys(Batch(args, target, torch.arange(n), kwargs)).tolist()


def test_alike_to_the_bit_is_the_same_whatever_the_batch():
    assert keys(X)[4:6] == keys(X[4:6])
    assert len({tuple(key) for key in keys(X)}) == 10
    assert keys(X.nextafter(X + 1))[3] != keys(X)[3]
    assert keys(X, target=torch.arange(10))[1] != keys(X)[1]
    assert keys(torch.tensor([[-0.0]])) == keys(torch.tensor([[0.0]]))


def test_inputs_do_not_change_places_and_padding_does_not_count():
    left, right = torch.tensor([[1, 2]]), torch.tensor([[3, 4]])
    assert keys(left, right) != keys(right, left)
    assert keys(a=left, b=right) == keys(b=right, a=left)
    assert keys(torch.tensor([[5, 6, 0, 0]])) == keys(torch.tensor([[5, 6]]))


def test_a_second_pass_counts_alone_and_ranks_join_theirs():
    source = TensorSource(X, torch.zeros(10), "all", batch_size=3)
    alone = content_recorder(source)
    for _ in range(2):
        assert len(list(alone)) == 4
    expected = keys(X)
    assert alone.gathered(Collective()).tolist() == expected

    def run(collective: Collective) -> list[list[int]]:
        share = Share(X, torch.zeros(10), "all", rank=collective.rank, world_size=2)
        recorder = content_recorder(share)
        list(recorder)
        return recorder.gathered(collective).tolist()

    assert on_ranks(2, run) == [expected] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_dtype_hides_nothing(dtype):
    x, y = torch.arange(2**24 - 4, 2**24 + 4)[:, None].float(), torch.arange(8)
    assert keys(x.to(dtype), target=y.float()) == keys(x, target=y)
    large = 2**40 + torch.arange(8)[:, None]
    assert len({tuple(key) for key in keys(large)}) == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_copies_of_less_precision_are_found_and_others_are_not(dtype):
    digits = torch.as_tensor(load_digits().data / 16)
    noise = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    for x in (digits.float(), digits, noise):
        y = torch.arange(len(x)) % 10
        half = len(x) // 2
        coarse = recorded(x.to(dtype), y)
        known, rest = recorded(x[:half], y[:half]), recorded(x[half:], y[half:])
        marked = torch.arange(len(x)) < half
        assert torch.equal(has_content_of(coarse, known, Collective()), marked)
        assert has_content_of(known, coarse, Collective()).all()
        assert not has_content_of(known, rest, Collective()).any()
    values = torch.arange(1, 9) / 7
    coarse, fine = recorded(X[:8], values.to(dtype)), recorded(X[:8], values)
    assert has_content_of(coarse, fine, Collective()).all()


def recorded(x: Tensor, y: Tensor) -> RecordingSource:
    recorder = content_recorder(TensorSource(x, y, "data", batch_size=64))
    for _ in recorder:
        pass
    return recorder


class Images(Dataset):
    """Samples in memory, of which a second object may augment the same ones."""

    def __init__(self, x: Any, y: Any, augment: bool = False) -> None:
        self.x, self.y, self.augment = x, y, augment

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


Y = torch.arange(10)


@pytest.mark.parametrize("x", [X, X.numpy(), [f"{i}.png" for i in range(10)]])
def test_two_objects_over_the_same_data_are_one_data_set(x):
    index = torch.arange(10)
    known = base_samples(Images(x, Y, augment=True), index)
    assert torch.equal(base_samples(Images(x, Y), index), known)
    assert not torch.equal(base_samples(Images(x, Y + 1), index), known)
    as_read = base_samples(Images(x, Y), index, as_read=True)
    assert not torch.equal(as_read, known)


def test_a_tensor_data_set_that_is_made_again_is_the_same():
    index = torch.arange(10)
    known = base_samples(TensorDataset(X, Y), index)
    assert torch.equal(base_samples(TensorDataset(X.clone(), Y.clone()), index), known)
    assert not torch.equal(base_samples(TensorDataset(X, Y + 1), index), known)


def test_equal_labels_alone_are_not_the_same_data():
    first, second = Images(range(10), Y), Images(range(10), Y)
    index = torch.arange(10)
    assert not torch.equal(base_samples(first, index), base_samples(second, index))


class Windows(Images):
    """Windows of one array from a position on."""

    def __init__(self, x: Any, start: int) -> None:
        super().__init__(x, Y)
        self.start = start


def test_windows_from_other_positions_are_other_data():
    index = torch.arange(10)
    first = base_samples(Windows(X, 0), index)
    assert torch.equal(base_samples(Windows(X, 0), index), first)
    assert not torch.equal(base_samples(Windows(X, 5), index), first)


class Padded(TensorSource):
    """Two batches, the second of rows of another length."""

    def __iter__(self) -> Iterator[Batch]:
        for start, length in ((0, 3), (2, int(self.targets[0]))):
            x = torch.ones(2, length)
            yield Batch((x,), self.targets[:2], torch.arange(start, start + 2), raw=[x])


@pytest.mark.parametrize(("length", "has_keys"), [(3, True), (4, False)])
def test_padded_samples_have_no_key(length, has_keys):
    recorder = raw_recorder(Padded(torch.ones(4, 3), torch.full((4,), length), "train", True))
    list(recorder)
    keys = gathered_keys([recorder], Collective())
    assert [bool(key) for key in keys] == [has_keys] * 4
