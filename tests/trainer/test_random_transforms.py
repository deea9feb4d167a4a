"""Data that draw at random: noticed, read with numbers of their own, or with the transform of the
validation data.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    default_collate,
)

from lightning_nrl._trainer.reading.loaders import LoaderSource, SeededDataset
from lightning_nrl._trainer.reading.random_transforms import (
    check_stability,
    report_stability,
    with_validation_view,
)
from lightning_nrl.errors import DataWarning


class Numbers(Dataset):
    """A hundred samples with labels; a function gives each its input."""

    def __init__(self, draw: Callable[[int], Any]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 100

    def __getitem__(self, i: int) -> Any:
        return self.draw(i), i % 3


def source(data: Any, split: str = "train") -> LoaderSource:
    data = data if isinstance(data, Dataset) else Numbers(data)
    place, loader = torch.arange(len(data)), DataLoader(data, 8)
    return LoaderSource(
        split, True, True, place, place, loader, SeededDataset(data, 0), lambda raw: raw
    )


OWN_GENERATOR = np.random.default_rng(0)


def by_own_generator(i: int) -> float:
    return float(OWN_GENERATOR.random())


def by_torch_every_second(i: int) -> float:
    return float(torch.rand(())) if i % 2 else float(i)


def by_seed(i: int) -> float:
    return float(np.random.default_rng(torch.initial_seed() % 2**32 + i).random())


def by_all(i: int) -> float:
    return float(torch.rand(())) + np.random.rand() + random.random()


@pytest.mark.parametrize(
    ("draw", "draws"),
    [(float, False), (by_torch_every_second, True), (by_seed, True), (by_all, True)],
)
def test_random_samples_stand_still_with_numbers_of_their_own(draw, draws):
    samples = SeededDataset(Numbers(draw), 0)
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    assert check_stability(samples, range(8), default_collate) == 0
    assert samples.draws == draws
    assert torch.equal(torch.get_rng_state(), expected)


def test_what_cannot_be_read_again_is_named_with_its_split():
    sources = [source(float), source(by_own_generator, "repair"), source(by_all, "test")]
    with pytest.warns(
        DataWarning, match="`repair` data: 32 of 32 samples that were read twice changed"
    ) as caught:
        sentences = report_stability(sources)
    assert len(caught) == 1
    assert "No guarantee for `repair`: 32 of 32 samples" in sentences
    assert "`test` draws at random: each sample was counted in one fixed draw." in sentences
    assert "`train`" not in sentences


def in_random_order(batch: list[Any]) -> Any:
    return default_collate([batch[i] for i in torch.randperm(len(batch))])


def by_size(batch: list[Any]) -> Any:
    return default_collate(sorted(batch, key=lambda sample: -sample[0]))


def mixed_up(batch: list[Any]) -> Any:
    x, y = default_collate(batch)
    return 0.5 * (x + x.roll(1, 0)), y


@pytest.mark.parametrize("collate", [in_random_order, by_size, mixed_up])
def test_a_collate_function_that_moves_or_mixes_samples_is_noticed(collate):
    data = Numbers(float)
    moving = replace(source(data, "val"), loader=DataLoader(data, 8, collate_fn=collate))
    with pytest.warns(
        DataWarning, match=r"`val` data: \d of 8 samples of a batch in reverse order changed"
    ) as caught:
        sentences = report_stability([moving, source(float), source(by_all, "test")])
    assert len(caught) == 1
    # The collate function of the training may stay.
    assert "give a loader without: `data=DataOptions(passed=DataLoader(" in str(caught[0].message)
    assert sentences.startswith("No guarantee for `val`: ")


def test_draws_of_a_sample_are_counted_as_samples_and_read_the_same_in_any_order():
    several = source(by_torch_every_second).with_draws(3)
    assert several.index.tolist() == [*range(100)] * 3
    passes = [torch.cat([batch.args[0] for batch in several]) for _ in range(2)]
    assert torch.equal(*passes)
    first, second, third = passes[0].chunk(3)
    odd = torch.arange(100) % 2 == 1
    assert torch.equal(first[~odd], third[~odd])
    assert not (first == second)[odd].any()
    (drawn,) = several.draw([torch.tensor([205, 4, 105])])
    assert drawn.args[0].tolist() == passes[0][[205, 4, 105]].tolist()
    assert "3 fixed draws" in report_stability([several])


Transform = Callable[[Tensor], Tensor]


class Images(Dataset):
    """As torchvision has it: position i is the image 10 i with the label i % 3, through a
    transform.
    """

    def __init__(self, first: int, n: int, transform: Transform | None) -> None:
        self.values = torch.arange(first, first + n) * 10.0
        self.transform = transform

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> Any:
        x = self.values[i].reshape(1)
        return x if self.transform is None else self.transform(x), i % 3


class Flipped(Images):
    """Its transform changes the label too."""

    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x, y + int(x > 100)


def jitter(x: Tensor) -> Tensor:
    return x + torch.rand(1)


def clean(x: Tensor) -> Tensor:
    return x + 100


def inputs(source: LoaderSource) -> list[float]:
    return torch.cat([batch.args[0] for batch in source]).flatten().tolist()


def has_view(source: LoaderSource) -> bool:
    return source.samples.dataset is not source.loader.dataset


def viewed(train: Dataset[Any], *validation: Dataset[Any]) -> LoaderSource:
    loaders = [DataLoader(data, 8) for data in validation]
    return with_validation_view(source(train), lambda: loaders[0] if len(loaders) == 1 else loaders)


def test_two_data_sets_over_the_same_images_split_by_position():
    train, val = Images(0, 6, jitter), Images(0, 6, clean)
    data = Subset(train, [5, 0, 2])
    view = viewed(data, Subset(val, [1, 3, 4]))
    assert has_view(view)
    assert inputs(view) == [150.0, 100.0, 120.0]
    # The training goes on with what the user made.
    assert view.loader.dataset is data
    assert view.identity.tolist() == [[id(train), 5], [id(train), 0], [id(train), 2]]
    assert train.transform is jitter


def test_other_images_for_validation():
    union = ConcatDataset([Images(0, 2, jitter), Subset(Images(2, 3, jitter), [1])])
    assert inputs(viewed(Images(0, 3, jitter), Images(7, 2, None))) == [0.0, 10.0, 20.0]
    assert inputs(viewed(union, Images(7, 2, clean), Images(9, 2, clean))) == [100.0, 110.0, 130.0]


JITTERED = Images(0, 6, jitter)


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        (Subset(JITTERED, [5, 0, 2]), [Subset(JITTERED, [1, 3, 4])]),  # one transform for both
        (Images(0, 3, Tensor.neg), [Images(7, 2, clean)]),  # nothing is drawn
        (JITTERED, [Images(7, 2, clean), Images(7, 2, Tensor.neg)]),  # which of the two
        (JITTERED, [Flipped(0, 3, clean)]),
        (Flipped(0, 3, jitter), [Flipped(7, 2, clean)]),
        (JITTERED, [Images(7, 2, Tensor.long)]),
        (JITTERED, [Images(7, 2, lambda x: x[7])]),
        (JITTERED, [Images(7, 2, lambda x: jitter(x))]),
        (JITTERED, [Images(7, 2, lambda x: x.expand(10, 1))]),
    ],
)
def test_a_view_that_may_show_other_samples_is_not_taken(train, validation):
    assert not has_view(viewed(train, *validation))
