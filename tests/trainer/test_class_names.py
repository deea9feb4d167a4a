from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_nrl._trainer.loaders import LoaderSource, SeededDataset
from lightning_nrl._trainer.sample_views import class_names


class Named(TensorDataset):
    def __init__(self, classes: Any) -> None:
        super().__init__(torch.zeros(4))
        self.classes = classes


def source(data: Dataset[Any]) -> LoaderSource:
    place = torch.arange(1)
    return LoaderSource("train", True, True, place, place, DataLoader(data), SeededDataset(data, 0), lambda raw: raw)


def test_names_are_found_in_subsets_and_unions() -> None:
    plain, named = TensorDataset(torch.zeros(4)), Named(["cat", "dog"])
    assert class_names([source(plain), source(ConcatDataset([plain, Subset(named, [1])]))]) == ("cat", "dog")
    assert class_names([source(plain)]) == ()


@pytest.mark.parametrize("classes", [None, [], 10, ["cat", 3], "cats", torch.arange(2)])
def test_what_is_no_list_of_names_is_none(classes: Any) -> None:
    assert class_names([source(Named(classes))]) == ()
