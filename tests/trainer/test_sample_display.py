from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_nrl._trainer.sample_views import display, find_normalization, to_pixels


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.full((3, 4, 5), 0.5), (4, 5, 3)),
        (torch.full((4, 5, 3), 0.5), (4, 5, 3)),
        (torch.full((1, 4, 5), 2.0), (4, 5, 3)),
        (torch.zeros(4, 5, dtype=torch.bool), (4, 5, 3)),
        (torch.full((4, 5), torch.nan), (4, 5, 3)),
        (torch.zeros(7), None),
        (torch.zeros(2, 4, 5), None),
        (torch.zeros(3, 1, 5), None),
        (torch.zeros(1, 3, 4, 5), None),
    ],
)
def test_images_of_all_forms(image: torch.Tensor, expected: tuple[int, ...] | None) -> None:
    pixels = to_pixels(image)
    assert (None if pixels is None else pixels.shape) == expected


def shown(x: torch.Tensor, **how: Any) -> Any:
    found = display(x, **how)
    assert found is not None
    assert not isinstance(found, str)
    return found


def test_numbers_from_0_to_1_are_shown_as_they_are_and_others_stretched() -> None:
    assert (shown(torch.full((4, 5), 0.5)) == 128).all()
    dark = torch.zeros(4, 5)
    dark[0, 0], dark[0, 1] = -2.0, 2.0
    assert shown(dark)[0, :3, 0].tolist() == [0, 255, 128]
    assert (shown(torch.full((4, 5), 7, dtype=torch.uint8)) == 7).all()


def test_of_many_channels_the_first_three_and_of_a_film_the_middle() -> None:
    bands = torch.arange(5.0)[:, None, None].expand(5, 4, 4) / 10
    assert shown(bands)[0, 0].tolist() == [0, 26, 51]
    assert shown(torch.full((2, 4, 4), 0.5))[0, 0].tolist() == [128] * 3
    film = torch.arange(3.0)[:, None, None, None].expand(3, 3, 4, 4) / 10
    assert shown(film.permute(1, 0, 2, 3))[0, 0].tolist() == [26] * 3  # channels first
    assert shown(torch.arange(5.0)[:, None, None, None].expand(5, 3, 4, 4) / 10)[0, 0].tolist() == [51] * 3


def test_tokens_are_the_words_of_the_sample_if_it_has_some() -> None:
    tokens = torch.tensor([7, 42, 0])
    assert display(tokens) == "tokens: 7 42 0"
    assert display(tokens, {"ids": tokens, "lang": "en", "text": "a bad day"}) == "a bad day"
    assert display(torch.arange(500)).endswith(" 119 ... 500 in all")


def test_few_numbers_are_a_table_and_many_are_curves() -> None:
    assert display(torch.tensor([[0.5], [2.0]])) == "0: 0.5\n1: 2"
    assert shown(torch.zeros(100)).shape == (360, 360, 3)
    both = torch.randn(2, 50)
    assert (shown(both) == shown(both.T)).all()


def test_a_curve_rises_with_its_values_and_stops_where_there_are_none() -> None:
    rising = torch.linspace(-3, 5, 101)
    middle = slice(204, 214)  # of the frame, from left to right
    coloured = is_coloured(shown(rising))
    rows, columns = coloured.nonzero()
    assert rows[columns.argmin()] == pytest.approx(0.9 * 360, abs=4)
    assert rows[columns.argmax()] == pytest.approx(0.06 * 360, abs=4)
    assert coloured[:, middle].any()
    rising[40:61] = float("nan")
    assert not is_coloured(shown(rising))[:, middle].any()
    assert not is_coloured(shown(torch.full((30,), float("inf")))).any()


def is_coloured(pixels: np.ndarray) -> np.ndarray:
    """Where the first curve is, which is blue on white and grey."""
    return pixels[..., 2].astype(int) - pixels[..., 0] > 60


@pytest.mark.parametrize("x", [torch.zeros(0), torch.zeros(3, 2, 2), torch.zeros(2, 4, 4, dtype=torch.complex64)])
def test_what_cannot_be_shown_is_none(x: torch.Tensor) -> None:
    assert display(x) is None


class Normalize:
    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = mean, std


def images(transform: Any) -> Any:
    data = TensorDataset(torch.zeros(3))
    data.transforms = SimpleNamespace(transform=transform)
    return data


def test_a_normalisation_is_found_in_wrapped_data_sets_and_nested_transforms() -> None:
    inner = images(SimpleNamespace(transforms=[object(), Normalize([0.5, 0.4, 0.3], torch.tensor([0.2, 0.2, 0.1]))]))
    found = find_normalization(ConcatDataset([Subset(inner, [0])]))
    assert found is not None
    assert found[0] == (0.5, 0.4, 0.3)
    assert found[1] == pytest.approx((0.2, 0.2, 0.1))
    assert find_normalization(images(Normalize(0.5, 0.25))) == ((0.5,), (0.25,))
    for other in (images(None), images(Normalize("mean", None)), images(Normalize([0.5], [0.1, 0.2])), object()):
        assert find_normalization(other) is None


def test_a_normalisation_is_undone_if_it_can_be_that_of_the_image() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    true = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    normalised = (true - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert abs(shown(normalised, normalization=(mean, std)).astype(int) - to_pixels(true).astype(int)).max() <= 1
    other = shown(10 * normalised, normalization=(mean, std))
    assert (other.min(), other.max()) == (0, 255)  # stretched
    assert (shown(normalised[:2], normalization=(mean, std)) == shown(normalised[:1])).all()
