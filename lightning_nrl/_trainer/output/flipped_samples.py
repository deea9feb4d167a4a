"""Views of broken and repaired samples for a report, as images, tables or text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_nrl._trainer.lightning.packages import rank_zero_warn
from lightning_nrl._trainer.reading.loaders import LoaderSource
from lightning_nrl._trainer.reading.random_transforms import innermost_datasets
from lightning_nrl._utils.formatting import writable
from lightning_nrl.data.batch import tensors_in
from lightning_nrl.errors import DataWarning, first_line
from lightning_nrl.records.splits import Flip, FlippedSample
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SampleView, caption_of
from lightning_nrl.report.tables import flipped_splits, most_telling

Render = Callable[[Any], object]
"""Maps a sample of the data set to an image (see `to_pixels`) or text."""
Pixels = npt.NDArray[np.uint8]
Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Means and standard deviations of the channels of normalised images."""

FEWEST_PIXELS = 4  # per side; a smaller tensor is not shown as an image
TABLE_VALUES, TOKENS = 24, 120  # largest number of table rows and of tokens per sample
ROUNDING = 0.02  # tolerance around [0, 1] of a denormalised image
MOST_VISITED = 200  # objects in the search for transforms
VIEWED_SAMPLES: Mapping[Flip, int] = {"broken": 24, "repaired": 12}
"""Largest number of views per split, of broken and of repaired samples."""


def display(
    x: Tensor,
    sample: object = None,
    normalization: Normalization | None = None,
    *,
    convolves: bool = True,
    features: Sequence[str] = (),
) -> Pixels | str | None:
    """Returns the model's input for one sample as an image, `height x width x 3`, or as text.

    Returns None if neither fits.

    A vector of integers is shown as the longest text in `sample`, or, if `sample` has no text, as a
    list of tokens. Any other vector is shown as a line of values with their `features`, which are
    the names of all values, or else with their positions. A tensor with more dimensions is shown as
    an image if the model has 2D or 3D convolutions (`convolves`), or if the tensor has one or three
    channels or is uint8. The image shows only the first three channels, and only the middle frame
    of a video. If values are outside of [0, 1], they are scaled to [0, 1].
    """
    x = x.detach().cpu()
    if x.is_complex() or not x.numel():
        return None
    if x.ndim == 1 and not (x.is_floating_point() or x.dtype == torch.bool):
        tokens = _first_values(x, TOKENS, "{1:.4g}", " ")
        return _longest_text(sample) or f"tokens: {tokens}"
    if x.ndim <= 1 or (x.ndim == 2 and min(x.shape) < FEWEST_PIXELS):
        return _first_values(x.flatten(), TABLE_VALUES, "{}: {:.4g}", ", ", features)
    has_channels = x.ndim > 2 and not {1, 3}.isdisjoint(x.shape)
    if not (convolves or has_channels or x.dtype == torch.uint8):
        return None
    image = _as_image(x)
    if image is None:
        return None
    original = _denormalized(image, normalization)
    if original is not None:
        return to_pixels(original)
    in_range = image.is_floating_point() and image.min() >= 0 and image.max() <= 1
    return to_pixels(image, stretched=not in_range)


def to_pixels(image: object, stretched: bool = False) -> Pixels | None:
    """Converts an image to `height x width x 3` uint8; returns None if it is no image.

    Values are uint8 or floats in [0, 1]. With `stretched`, floats may have any range, and the
    smallest becomes black and the largest white. The image has 1 or 3 channels in its first or last
    dimension, or it is two-dimensional.
    """
    x = image.detach().cpu() if isinstance(image, Tensor) else torch.as_tensor(np.array(image))
    if x.is_complex() or x.ndim not in (2, 3):
        return None
    x = _channels_first(x)
    if x.shape[0] not in (1, 3) or min(x.shape[1:]) < FEWEST_PIXELS:
        return None
    if x.dtype != torch.uint8:
        x = x.double().nan_to_num(0.0)
        if stretched:
            least, most = x.min(), x.max()
            x = (x - least) / (most - least).clamp_min(1e-12)
        x = (255 * x.clamp(0, 1)).round().to(torch.uint8)
    return x.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def find_normalization(dataset: object) -> Normalization | None:
    """Returns mean and std of the last `Normalize` transform in a data set, or None."""
    normalization = None
    for item in _nested_objects(dataset):
        if type(item).__name__ == "Normalize":  # of torchvision or another library
            mean, std = (_numbers(getattr(item, name, None)) for name in ("mean", "std"))
            if mean and len(mean) == len(std):
                normalization = mean, std
    return normalization


def _nested_objects(dataset: object) -> Iterator[object]:
    seen: set[int] = set()
    waiting = [dataset]
    while waiting and len(seen) < MOST_VISITED:
        item = waiting.pop(0)
        if id(item) not in seen:
            seen.add(id(item))
            yield item
            waiting += _parts(item)


def _parts(item: object) -> list[object]:
    parts = item if isinstance(item, (list, tuple)) else getattr(item, "__dict__", {}).values()
    if len(parts) > MOST_VISITED:  # samples, not transforms
        return []
    objects = [part for part in parts if not isinstance(part, (Tensor, type, str))]
    return [
        part for part in objects if isinstance(part, (list, tuple)) or hasattr(part, "__dict__")
    ]


def _numbers(values: Any) -> tuple[float, ...]:
    if not isinstance(values, (Sequence, Tensor)):
        values = [values]
    try:
        return tuple(map(float, values))
    except (TypeError, ValueError):
        return ()


def _channels_first(x: Tensor) -> Tensor:
    if x.ndim == 2:
        return x[None]
    if x.shape[0] not in (1, 3) and x.shape[2] in (1, 3):
        return x.permute(2, 0, 1)
    return x


def _as_image(x: Tensor) -> Tensor | None:
    if x.ndim == 4:  # the middle frame
        x = x[:, x.shape[1] // 2] if x.shape[0] in (1, 3) else x[x.shape[0] // 2]
    if x.ndim > 3:
        return None
    x = _channels_first(x)
    if x.shape[0] not in (1, 3):
        x = x[:3] if x.shape[0] > 3 else x[:1]
    return x if min(x.shape[1:]) >= FEWEST_PIXELS else None


def _denormalized(image: Tensor, normalization: Normalization | None) -> Tensor | None:
    if normalization is None or not image.is_floating_point():
        return None
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in normalization)
    if len(mean) not in (1, len(image)):
        return None
    original = image.double() * std[:, None, None] + mean[:, None, None]
    if original.min() < -ROUNDING or original.max() > 1 + ROUNDING:
        return None
    return original


def _longest_text(sample: object) -> str:
    parts = list(sample.values()) if isinstance(sample, Mapping) else sample
    if not isinstance(parts, (list, tuple)):
        return ""
    return max((part for part in parts if isinstance(part, str)), key=len, default="")


def _first_values(
    x: Tensor, most: int, template: str, separator: str, features: Sequence[str] = ()
) -> str:
    names = features if len(features) == len(x) else range(len(x))
    values = list(map(template.format, names, x[:most].tolist()))
    if len(x) > most:
        values.append(f"... {len(x):,} in all")
    return separator.join(values)


def sample_views(
    report: RepairReport,
    sources: Sequence[LoaderSource],
    render: Render | None = None,
    *,
    model: nn.Module,
) -> tuple[SampleView, ...]:
    """Returns views of the most clearly broken and repaired samples of each split.

    A sample may have no view.
    """
    convolves = any(isinstance(module, (nn.Conv2d, nn.Conv3d)) for module in model.modules())
    by_split = {source.split: source for source in sources}
    views: list[SampleView] = []
    try:
        for flip, n in VIEWED_SAMPLES.items():
            for split in flipped_splits(report):
                source = by_split.get(split.split)
                if source is not None:
                    samples = most_telling(split.flipped_as(flip))[:n]
                    views += _views(report, source, samples, render, convolves)
    except Exception as error:  # of the user's code; a missing picture must not end the repair
        raised = f"{type(error).__name__}: {first_line(error)}"
        rank_zero_warn(
            DataWarning(
                f"`render`: samples cannot be shown: {raised}.",
                "pass `data=DataOptions(render=f)` with f(sample) -> image or text.",
            )
        )
    return tuple(views)


def _views(
    report: RepairReport,
    source: LoaderSource,
    flipped: Sequence[FlippedSample],
    render: Render | None,
    convolves: bool,
) -> Iterator[SampleView]:
    normalization = find_normalization(source.samples)
    for flip in flipped:
        sample = source.samples[flip.id]
        if render is not None:
            view = render(sample)
            if not isinstance(view, str):
                view = to_pixels(view)
        else:
            view = _display_input(source, sample, normalization, convolves)
        caption = caption_of(flip, report.class_name)
        if isinstance(view, str):
            yield SampleView(source.split, flip.id, flip.flip, caption, text=view)
        elif view is not None:
            yield SampleView(source.split, flip.id, flip.flip, caption, view)


def _display_input(
    source: LoaderSource, sample: object, normalization: Normalization | None, convolves: bool
) -> Pixels | str | None:
    args, kwargs, _ = source.adapter(source.loader.collate_fn([sample]))
    first = next(tensors_in((args, kwargs)), None)
    if first is None or not len(first):
        return None
    features = names_in([source], "feature_names")
    return display(first[0], sample, normalization, convolves=convolves, features=features)


def names_in(sources: Iterable[LoaderSource], attribute: str) -> tuple[str, ...]:
    """Returns the names in an attribute of the first data set that has it.

    `classes` is as in torchvision, `feature_names` as in scikit-learn.
    """
    for source in sources:
        for dataset in innermost_datasets(source.loader):
            names = getattr(dataset, attribute, None)
            is_list = isinstance(names, (list, tuple))
            if is_list and names and all(isinstance(name, str) for name in names):
                return tuple(map(writable, names))
    return ()
