"""Inputs of the samples that a repair flipped, read once more and made pictures or text for a reviewer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nrl._lightning import rank_zero_warn
from lightning_nrl._trainer.loaders import LoaderSource
from lightning_nrl.data.batch import tensors_in
from lightning_nrl.errors import DataWarning
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_records import FlippedSample
from lightning_nrl.report.sample_tables import flipped_splits, most_telling
from lightning_nrl.report.sample_views import SampleView, caption_of

__all__ = ["Render", "sample_views", "to_pixels"]

Render = Callable[[Any], Any]
"""Takes one sample as the data set gives it; gives an image (see `to_pixels`) or text."""

VIEWED_SAMPLES = {"broken": 24, "repaired": 12}
"""Of each split, at most."""
FEWEST_PIXELS = 4
"""A side of less is no picture."""


def sample_views(
    report: RepairReport, sources: Sequence[LoaderSource], render: Render | None = None
) -> tuple[SampleView, ...]:
    """Views of the broken samples and of the most telling repaired ones, of each split.

    Without `render` the model's input is shown if it looks like an image, its values stretched from black to white.
    What cannot be read or rendered is left out, with one warning.

    Args:
        report: names the samples.
        sources: the splits that it is about.
        render: makes an image or text of a sample.
    """
    found: list[SampleView] = []
    by_split = {source.split: source for source in sources}
    try:
        for split in flipped_splits(report):
            telling = most_telling(split.flipped)
            chosen = [
                one for flip, most in VIEWED_SAMPLES.items() for one in [x for x in telling if x.flip == flip][:most]
            ]
            if chosen and split.split in by_split:
                found += _views(report, by_split[split.split], chosen, render)
    except Exception as error:  # the user's data set or function; no picture is worth a repair
        problem = f"`render`: samples cannot be shown: {type(error).__name__}: {error}".partition("\n")[0]
        rank_zero_warn(DataWarning(f"{problem}.", "pass `data=DataOptions(render=f)` with f(sample) -> image or text."))
    return tuple(found)


def _views(
    report: RepairReport, source: LoaderSource, samples: Sequence[FlippedSample], render: Render | None
) -> Iterator[SampleView]:
    for one in samples:
        shown: Any = None
        if render is not None:
            shown = render(source.samples[one.id])
        else:
            args, kwargs, _ = source.adapter(source.loader.collate_fn([source.samples[one.id]]))
            first = next(tensors_in((args, kwargs)), None)
            shown = None if first is None or not len(first) else first[0]
        caption = caption_of(one, report.class_name)
        if isinstance(shown, str):
            yield SampleView(source.split, one.id, one.flip, caption, text=shown)
            continue
        pixels = to_pixels(shown, stretched=render is None)
        if pixels is not None:
            yield SampleView(source.split, one.id, one.flip, caption, pixels)


def to_pixels(image: Any, stretched: bool = False) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """An image as `height x width x 3` uint8; None for what is none.

    Args:
        image: `height x width`, with 1 or 3 channels first or last; uint8, or floating-point numbers in [0, 1]. Also
            what numpy can make an array of, such as a PIL image.
        stretched: whether the least value becomes black and the largest white, whatever they are.
    """
    x = image.detach().cpu() if isinstance(image, Tensor) else torch.as_tensor(np.array(image))
    if x.is_complex() or x.ndim not in (2, 3):
        return None
    if x.ndim == 2:
        x = x[None]
    elif x.shape[0] not in (1, 3) and x.shape[2] in (1, 3):
        x = x.permute(2, 0, 1)
    if x.shape[0] not in (1, 3) or min(x.shape[1:]) < FEWEST_PIXELS:
        return None
    if x.dtype != torch.uint8:
        x = x.double().nan_to_num(0.0)
        if stretched:
            least, most = x.min(), x.max()
            x = (x - least) / (most - least).clamp_min(1e-12)
        x = (255 * x.clamp(0, 1)).round().to(torch.uint8)
    return x.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
