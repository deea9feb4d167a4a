from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_nrl._trainer.loaders import LoaderSource, SeededDataset
from lightning_nrl._trainer.random_transforms import (
    Stability,
    check_stability,
    checked_positions,
    is_same,
    report_stability,
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


def source(draw: Callable[[int], Any], split: str = "train", **arguments: Any) -> LoaderSource:
    loader: DataLoader[Any] = DataLoader(Numbers(draw), 8, **arguments)
    place = torch.arange(100)
    return LoaderSource(split, True, True, place, place, loader, SeededDataset(loader.dataset, 0), lambda raw: raw)


OWN_GENERATOR = np.random.default_rng(0)


def by_own_generator(i: int) -> float:
    return float(OWN_GENERATOR.random())


def by_own_generator_every_second(i: int) -> float:
    return by_own_generator(i) if i % 2 else float(i)


def by_torch_every_second(i: int) -> float:
    return float(torch.rand(())) if i % 2 else float(i)


def by_seed(i: int) -> float:
    return float(np.random.default_rng(torch.initial_seed() % 2**32 + i).random())


def by_all(i: int) -> float:
    return float(torch.rand(())) + np.random.rand() + random.random()


@pytest.mark.parametrize(
    ("draw", "draws"), [(float, False), (by_torch_every_second, True), (by_seed, True), (by_all, True)]
)
def test_random_samples_stand_still_with_numbers_of_their_own(draw: Callable[[int], float], draws: bool) -> None:
    samples = SeededDataset(Numbers(draw), 0)
    assert check_stability(samples, range(8), default_collate) == Stability(checked=8, unstable=0)
    assert samples.draws == draws


def test_a_generator_of_the_data_sets_own_is_noticed() -> None:
    samples = SeededDataset(Numbers(by_own_generator_every_second), 0)
    assert check_stability(samples, range(8), default_collate) == Stability(checked=8, unstable=4)


def test_a_collate_function_that_draws_is_noticed() -> None:
    def collate(batch: list[Any]) -> Any:
        x, y = default_collate(batch)
        return x + torch.rand(()), y

    assert check_stability(SeededDataset(Numbers(float), 0), range(8), collate) == Stability(checked=8, unstable=8)


def test_the_check_leaves_the_global_generators_as_found() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    check_stability(SeededDataset(Numbers(by_all), 0), range(8), default_collate)
    assert torch.rand(2).tolist() == expected


def test_the_samples_that_are_checked_are_spread_over_the_split() -> None:
    positions = checked_positions(source(float))
    assert len(positions) == 32
    assert positions == sorted(set(positions))
    assert min(positions) < 10
    assert max(positions) >= 90
    assert 8 <= sum(i % 2 for i in positions) <= 24


def test_what_cannot_be_read_again_is_named_with_its_split() -> None:
    sources = [source(float), source(by_own_generator, "repair"), source(by_all, "test")]
    with pytest.warns(DataWarning, match="`repair` data: 32 of 32 samples that were read twice changed") as caught:
        sentences = report_stability(sources)
    assert len(caught) == 1
    assert "No guarantee for `repair`: 32 of 32 samples" in sentences
    assert "`test` draws at random: each sample was counted in one fixed draw." in sentences
    assert "`train`" not in sentences


@pytest.mark.parametrize("draw", [float, by_torch_every_second, by_all])
def test_what_stands_still_is_not_warned_of(draw: Callable[[int], float], recwarn: pytest.WarningsRecorder) -> None:
    report_stability([source(draw)])
    assert not recwarn


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.tensor([1.0, torch.nan]), 3),
        lambda: {"image": np.array([1, 2]), "text": "seven", "none": None, "nan": float("nan")},
        lambda: ([torch.ones(2), "a"], (1, 2.0)),
    ],
)
def test_samples_with_the_same_values_are_the_same(make: Callable[[], Any]) -> None:
    assert is_same(make(), make())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((torch.ones(2), 3), (torch.ones(2), 4)),
        ({"image": np.array([1, 2])}, {"image": np.array([1, 3])}),
        ({"a": 1}, {"b": 1}),
        ([1, 2], [1, 2, 3]),
        ("a", "b"),
    ],
)
def test_samples_with_other_values_are_not(a: Any, b: Any) -> None:
    assert not is_same(a, b)


def test_draws_of_a_sample_are_counted_as_samples_and_read_the_same_in_any_order() -> None:
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


def test_several_draws_are_named_in_a_report() -> None:
    assert "3 fixed draws" in report_stability([source(by_torch_every_second).with_draws(3)])
