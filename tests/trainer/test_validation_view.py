from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_nrl._trainer.loaders import LoaderSource, SeededDataset
from lightning_nrl._trainer.random_transforms import with_validation_view

Transform = Callable[[Tensor], Tensor]


class Images(Dataset):
    """As torchvision has it: position i is the image 10 i with the label i % 3, through a transform."""

    def __init__(self, first: int, n: int, transform: Transform | None) -> None:
        self.values = torch.arange(first, first + n) * 10.0
        self.transform = transform

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> Any:
        x = self.values[i].reshape(1)
        return x if self.transform is None else self.transform(x), i % 3


class OtherImages(Images):
    pass


def jitter(x: Tensor) -> Tensor:
    return x + torch.rand(1)


def clean(x: Tensor) -> Tensor:
    return x + 100


def shifted(x: Tensor) -> Tensor:
    return x + 200


def source(data: Dataset[Any]) -> LoaderSource:
    loader: DataLoader[Any] = DataLoader(data, 8)
    place = torch.arange(len(data))  # type: ignore[arg-type]
    return LoaderSource("train", True, False, place, place, loader, SeededDataset(data, 0), lambda raw: raw)


def inputs(source: LoaderSource) -> list[float]:
    return torch.cat([batch.args[0] for batch in source]).flatten().tolist()


def viewed(train: Dataset[Any], *validation: Dataset[Any]) -> LoaderSource:
    loaders = [DataLoader(data, 8) for data in validation]
    return with_validation_view(source(train), lambda: loaders[0] if len(loaders) == 1 else loaders)


def test_two_data_sets_over_the_same_images_split_by_position() -> None:
    train, val = Images(0, 6, jitter), Images(0, 6, clean)
    data = Subset(train, [5, 0, 2])
    found = viewed(data, Subset(val, [1, 3, 4]))
    assert found.has_validation_view
    assert inputs(found) == [150.0, 100.0, 120.0]
    # The training goes on with what the user made.
    assert found.loader.dataset is data
    assert found.identity.tolist() == [[id(train), 5], [id(train), 0], [id(train), 2]]
    assert train.transform is jitter


def test_other_images_for_validation() -> None:
    union = ConcatDataset([Images(0, 2, jitter), Subset(Images(2, 3, jitter), [1])])
    assert inputs(viewed(Images(0, 3, jitter), Images(7, 2, clean))) == [100.0, 110.0, 120.0]
    assert inputs(viewed(Images(0, 3, jitter), Images(7, 2, None))) == [0.0, 10.0, 20.0]
    assert inputs(viewed(union, Images(7, 2, clean))) == [100.0, 110.0, 130.0]


def test_one_data_set_split_by_position_has_no_other_view() -> None:
    data = Images(0, 6, jitter)
    found = viewed(Subset(data, [5, 0, 2]), Subset(data, [1, 3, 4]))
    assert not found.has_validation_view
    assert found.samples.dataset is found.loader.dataset


def test_data_that_draw_nothing_stay_as_they_are() -> None:
    found = viewed(Images(0, 3, shifted), Images(7, 2, clean))
    assert not found.has_validation_view
    assert inputs(found) == [200.0, 210.0, 220.0]


def with_other_types(x: Tensor) -> Tensor:
    return x.long()


def with_ten_crops(x: Tensor) -> Tensor:
    return x.expand(10, 1)


def not_for_these(x: Tensor) -> Tensor:
    raise ValueError("too small")


@pytest.mark.parametrize("transform", [with_other_types, with_ten_crops, not_for_these, lambda x: jitter(x)])
def test_a_transform_that_does_not_fit_is_not_taken(transform: Transform) -> None:
    assert not viewed(Images(0, 3, jitter), Images(7, 2, transform)).has_validation_view


def test_two_validation_transforms_say_nothing() -> None:
    assert not viewed(Images(0, 3, jitter), Images(7, 2, clean), Images(7, 2, shifted)).has_validation_view
    assert viewed(Images(0, 3, jitter), Images(7, 2, clean), Images(9, 2, clean)).has_validation_view


class Flipped(Images):
    """Its transform changes the label too."""

    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x, y + int(x > 100)


def test_another_class_or_other_targets_say_that_it_is_another_sample() -> None:
    assert not viewed(Images(0, 3, jitter), OtherImages(0, 3, clean)).has_validation_view
    assert not viewed(Flipped(0, 3, jitter), Flipped(7, 2, clean)).has_validation_view


def test_without_validation_data_or_transform_nothing_is_asked() -> None:
    assert not with_validation_view(source(Images(0, 3, jitter)), lambda: None).has_validation_view
    with_validation_view(source(TensorDataset(torch.zeros(2), torch.zeros(2))), lambda: pytest.fail("asked"))
