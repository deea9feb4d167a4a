"""How flipped samples are shown: as images, tables, tokens, or by a function of the user's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_nrl._trainer.output.flipped_samples import (
    display,
    find_normalization,
    names_in,
    sample_views,
    to_pixels,
)
from lightning_nrl._trainer.reading.loaders import LoaderSource, SeededDataset
from lightning_nrl.errors import DataWarning
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.records import SplitReport
from lightning_nrl.records.splits import FlippedSample
from lightning_nrl.report import RepairReport

IMAGES = torch.arange(3 * 16.0).reshape(3, 1, 4, 4)
NO_CONVOLUTION = nn.Identity()
REPAIRED = FlippedSample(2, "repaired", True, 1, 0, 1, -0.5, 2.0)
BROKEN = FlippedSample(0, "broken", False, 0, 0, 1, 0.5, -1.0)


class Normalize:
    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = mean, std


def source(data: Dataset[Any]) -> LoaderSource:
    place = torch.arange(len(data))
    samples, adapter = SeededDataset(data, 0), lambda raw: ((raw[0],), {}, raw[1])
    return LoaderSource(
        "val", True, True, place, place, DataLoader(data), samples, lambda raw: raw, adapter
    )


def views(
    x: Tensor, *flipped: FlippedSample, render: Any = None, model: nn.Module = NO_CONVOLUTION
) -> Any:
    split = SplitReport("val", "known", TargetCounts(0, 0, 0, 0), flipped=flipped)
    report = RepairReport("repaired", "", (), "", "", "", (split,), class_names=("cat", "dog"))
    return sample_views(
        report, [source(TensorDataset(x, torch.arange(len(x))))], render, model=model
    )


def test_broken_samples_come_first_with_captions_and_their_own_pixels():
    broken, repaired = views(IMAGES, REPAIRED, BROKEN)
    assert (broken.id, broken.flip, repaired.id) == (0, "broken", 2)
    assert broken.caption == "0: true cat, cat -> dog, margin 0.5 -> -1"
    assert (broken.pixels.shape, broken.pixels.dtype) == ((4, 4, 3), np.uint8)
    assert (broken.pixels[0, 0].tolist(), broken.pixels[3, 3].tolist()) == ([0] * 3, [255] * 3)


def test_render_gets_the_sample_and_may_give_text_or_an_image():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    text = views(rows, BROKEN, REPAIRED, render=lambda sample: f"age {sample[0][1]:g}")
    assert [(view.pixels, view.text) for view in text] == [(None, "age 2"), (None, "age 6")]
    (image,) = views(rows, BROKEN, render=lambda sample: np.full((5, 6), 128, dtype=np.uint8))
    assert (image.pixels.shape, image.pixels.min(), image.pixels.max()) == ((5, 6, 3), 128, 128)
    with pytest.warns(DataWarning, match=r"`render`: .*ZeroDivisionError"):
        assert views(rows, BROKEN, render=lambda sample: 1 / 0) == ()


def test_names_of_classes_are_found_in_subsets_and_unions():
    plain, named = TensorDataset(torch.zeros(4)), TensorDataset(torch.zeros(4))
    named.classes = ["cat", "dog"]
    union = ConcatDataset([plain, Subset(named, [1])])
    assert names_in([source(plain), source(union)], "classes") == ("cat", "dog")


def test_values_have_the_names_of_the_features_of_the_data_set():
    data = TensorDataset(torch.tensor([[0.5, 2.0], [1.0, -1.0]]), torch.arange(2))
    data.feature_names = ["age", "weight"]
    split = SplitReport("val", "known", TargetCounts(0, 0, 0, 0), flipped=(BROKEN,))
    report = RepairReport("repaired", "", (), "", "", "", (split,), class_names=("cat", "dog"))
    (view,) = sample_views(report, [source(data)], model=NO_CONVOLUTION)
    assert view.text == "age: 0.5, weight: 2"


BANDS = torch.arange(5.0)[:, None, None] / 10
ROWS = torch.tensor([[0.5, 2.0, -1.0]])


@pytest.mark.parametrize(
    ("x", "shown"),
    [
        (torch.full((4, 5), 0.5), [128] * 3),
        (torch.full((4, 5), 7, dtype=torch.uint8), [7] * 3),
        (torch.full((4, 5, 3), 0.5), [128] * 3),  # channels last
        (torch.full((4, 5), torch.nan), [0] * 3),
        (BANDS.expand(5, 4, 4), [0, 26, 51]),  # the first three channels
        (BANDS[:, None].expand(5, 3, 4, 4), [51] * 3),  # the middle of a film
        (torch.zeros(0), None),
        (torch.zeros(3, 2, 2), None),
        (ROWS, "0: 0.5, 1: 2, 2: -1"),
        (torch.tensor([7, 42, 0]), "tokens: 7 42 0"),
    ],
)
def test_an_input_is_shown_as_what_it_looks_like(x, shown):
    view = display(x)
    if isinstance(view, np.ndarray):
        view = view[0, 0].tolist()
    assert view == shown


def test_long_rows_are_cut_and_words_go_before_tokens():
    assert display(ROWS, features=("age", "weight", "height")) == "age: 0.5, weight: 2, height: -1"
    assert str(display(torch.zeros(100))).endswith("23: 0, ... 100 in all")
    assert str(display(torch.arange(500))).endswith(" 119 ... 500 in all")
    assert display(torch.tensor([7, 42]), {"lang": "en", "text": "a bad day"}) == "a bad day"


def images(transform: Any) -> Any:
    data = TensorDataset(torch.zeros(3))
    data.transforms = SimpleNamespace(transform=transform)
    return data


def test_a_normalisation_is_found_in_wrapped_data_sets_and_nested_transforms():
    inner = images(
        SimpleNamespace(
            transforms=[object(), Normalize([0.5, 0.4, 0.3], torch.tensor([0.2, 0.2, 0.1]))]
        )
    )
    mean, std = (pytest.approx((0.5, 0.4, 0.3)), pytest.approx((0.2, 0.2, 0.1)))
    assert find_normalization(ConcatDataset([Subset(inner, [0])])) == (mean, std)
    assert find_normalization(images(Normalize(0.5, 0.25))) == ((0.5,), (0.25,))
    assert find_normalization(images(None)) is None
    assert find_normalization(images(Normalize([0.5], [0.1, 0.2]))) is None


def test_a_normalisation_is_undone_if_it_can_be_that_of_the_image():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    true = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    normalised = (true - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    shown, expected = display(normalised, normalization=(mean, std)), to_pixels(true)
    assert abs(shown.astype(int) - expected.astype(int)).max() <= 1
    stretched = display(10 * normalised, normalization=(mean, std))
    assert (stretched.min(), stretched.max()) == (0, 255)
