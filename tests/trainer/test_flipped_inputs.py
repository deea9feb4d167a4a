from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl._trainer.loaders import LoaderSource, SeededDataset
from lightning_nrl._trainer.sample_views import sample_views
from lightning_nrl.errors import DataWarning
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.report import RepairReport, SplitReport
from lightning_nrl.report.splits import FlippedSample


def source(x: torch.Tensor) -> LoaderSource:
    data = TensorDataset(x, torch.arange(len(x)))
    place = torch.arange(len(x))
    return LoaderSource("val", True, True, place, place, DataLoader(data), SeededDataset(data, 0), lambda raw: raw)


def report(*samples: FlippedSample) -> RepairReport:
    split = SplitReport("val", "known", TargetCounts(0, 0, 0, 0), flipped=samples)
    return RepairReport("repaired", "", (), "", "", "", (split,), class_names=("cat", "dog"))


def with_pairs(one: LoaderSource) -> LoaderSource:

    return replace(one, adapter=lambda raw: ((raw[0],), {}, raw[1]))


IMAGES = torch.arange(3 * 16.0).reshape(3, 1, 4, 4)
REPAIRED = FlippedSample(2, "repaired", True, 1, 0, 1, -0.5, 2.0)
BROKEN = FlippedSample(0, "broken", False, 0, 0, 1, 0.5, -1.0)


def test_broken_samples_come_first_with_captions_and_their_own_pixels() -> None:
    views = sample_views(report(REPAIRED, BROKEN), [with_pairs(source(IMAGES))])
    assert [(view.split, view.id, view.flip) for view in views] == [("val", 0, "broken"), ("val", 2, "repaired")]
    assert views[0].caption == "0: true cat, cat -> dog, margin 0.5 -> -1"
    assert views[1].caption == "2: true dog, cat -> dog, margin -0.5 -> 2"
    for view in views:
        assert view.pixels is not None
        assert (view.pixels.shape, view.pixels.dtype) == ((4, 4, 3), np.uint8)
        assert (view.pixels[0, 0].tolist(), view.pixels[3, 3].tolist()) == ([0] * 3, [255] * 3)


def test_a_row_of_features_is_a_table_and_what_cannot_be_shown_is_left_out() -> None:
    (view,) = sample_views(report(BROKEN), [with_pairs(source(torch.tensor([[0.25, -1.0], [0.0, 0.0], [1.0, 1.0]])))])
    assert (view.text, view.pixels) == ("0: 0.25\n1: -1", None)
    assert sample_views(report(BROKEN), [with_pairs(source(torch.zeros(3, 5, 2, 2)))]) == ()
    assert sample_views(report(BROKEN), []) == ()


def test_a_normalisation_of_the_data_set_is_undone() -> None:
    class Normalize:
        mean, std = [0.5], [0.25]

    one = with_pairs(source((torch.full((3, 1, 4, 4), 0.75) - 0.5) / 0.25))
    one.samples.dataset.transform = [Normalize()]
    (view,) = sample_views(report(BROKEN), [one])
    assert view.pixels is not None
    assert (view.pixels == 191).all()


def test_render_gets_the_sample_and_may_give_text_or_an_image() -> None:
    rows = source(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    text = sample_views(report(BROKEN, REPAIRED), [rows], lambda sample: f"age {sample[0][1]:g}")
    assert [(view.pixels, view.text) for view in text] == [(None, "age 2"), (None, "age 6")]
    (image,) = sample_views(report(BROKEN), [rows], lambda sample: np.full((5, 6), 128, dtype=np.uint8))
    assert image.pixels is not None
    assert (image.pixels.shape, image.pixels.min(), image.pixels.max()) == ((5, 6, 3), 128, 128)


def test_a_render_that_raises_costs_the_pictures_alone() -> None:
    def render(sample: Any) -> Any:
        raise ValueError("no such font")

    with pytest.warns(DataWarning, match=r"`render`: .*ValueError: no such font"):
        assert sample_views(report(BROKEN), [source(IMAGES)], render) == ()
