"""Views of broken and repaired samples for a report: images, tables or text, or what the user's
function returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_nrl._trainer.lightning.packages import rank_zero_warn
from lightning_nrl._trainer.loaders import LoaderSource
from lightning_nrl._trainer.random_transforms import innermost_datasets
from lightning_nrl.data.batch import tensors_in
from lightning_nrl.errors import DataWarning
from lightning_nrl.records.splits import FlippedSample
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SampleView, caption_of
from lightning_nrl.report.tables import flipped_splits, most_telling

Render = Callable[[Any], Any]
"""Maps a sample of the data set to an image (see `to_pixels`) or text."""
Pixels = npt.NDArray[np.uint8]
Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Means and standard deviations of the channels of normalised images."""

FEWEST_PIXELS = 4  # per side; a smaller tensor is not shown as an image
TABLE_VALUES, TOKENS = 24, 120  # largest number of table rows and of tokens per sample
ROUNDING = 0.02  # tolerance around [0, 1] of a denormalised image
DEEPEST, MOST_VISITED = 12, 200  # limits of the search for transforms: depth, and number of objects
VIEWED_SAMPLES = {"broken": 24, "repaired": 12}
"""Largest number of views per split, of broken and of repaired samples."""


def display(
    x: Tensor,
    sample: Any = None,
    normalization: Normalization | None = None,
    *,
    convolves: bool = True,
) -> Pixels | str | None:
    """Returns the model's input for one sample as an image (`height x width x 3`) or as text, or
    None
    if neither fits.

    A vector of integers is shown as the longest text in `sample`, or, if `sample` has no text, as a
    list of tokens. Any other vector is shown as a table. A tensor with more dimensions is shown as
    an image if the model has 2D or 3D convolutions (`convolves`), or if the tensor has one or three
    channels or is uint8. The image shows only the first three channels, and only the middle frame
    of a video. If values are outside of [0, 1], they are scaled to [0, 1].
    """
    x = x.detach().cpu()
    if x.is_complex() or not x.numel():
        return None
    if x.ndim == 1 and not (x.is_floating_point() or x.dtype == torch.bool):
        return _longest_text(sample) or _tokens(x)
    if x.ndim <= 1 or (x.ndim == 2 and min(x.shape) < FEWEST_PIXELS):
        return _table(x.flatten())
    has_channels = x.ndim > 2 and any(size in (1, 3) for size in x.shape)
    image = _as_image(x) if convolves or has_channels or x.dtype == torch.uint8 else None
    if image is None:
        return None
    shown = _denormalized(image, normalization)
    if shown is not None:
        return to_pixels(shown)
    inside = image.is_floating_point() and float(image.min()) >= 0 and float(image.max()) <= 1
    return to_pixels(image, stretched=not inside)


def to_pixels(image: Any, stretched: bool = False) -> Pixels | None:
    """Converts an image to `height x width x 3` uint8; returns None if it is no image.

    Values are uint8 or floats in [0, 1]. With `stretched`, floats may have any range, and the
    smallest becomes black and the largest white. The image has 1 or 3 channels in its first or last
    dimension, or it is two-dimensional.
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


def find_normalization(dataset: object) -> Normalization | None:
    """Returns mean and std of the last `Normalize` transform in a data set and the data sets inside
    it, or None.
    """
    found: Normalization | None = None
    for one in _nested_objects(dataset):
        if type(one).__name__ == "Normalize":  # of torchvision or another library
            mean, std = (_numbers(getattr(one, name, None)) for name in ("mean", "std"))
            if mean and std and len(mean) == len(std):
                found = mean, std
    return found


def _nested_objects(dataset: object) -> Iterator[object]:
    seen: set[int] = set()
    waiting: list[tuple[object, int]] = [(dataset, 0)]
    while waiting and len(seen) < MOST_VISITED:
        one, depth = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if depth < DEEPEST:
            inside = (
                one
                if isinstance(one, (list, tuple))
                else list(getattr(one, "__dict__", {}).values())
            )
            few = (
                inside if len(inside) <= MOST_VISITED else ()
            )  # longer lists hold samples, not transforms
            parts = (part for part in few if not isinstance(part, (Tensor, type, str)))
            waiting += [
                (part, depth + 1)
                for part in parts
                if isinstance(part, (list, tuple)) or hasattr(part, "__dict__")
            ]


def _numbers(values: Any) -> tuple[float, ...]:
    try:
        return tuple(
            float(value)
            for value in (values if isinstance(values, (Sequence, Tensor)) else [values])
        )
    except (TypeError, ValueError):
        return ()


def _as_image(x: Tensor) -> Tensor | None:
    if x.ndim == 2:
        return x
    if x.ndim == 3:
        if x.shape[2] in (1, 3) and x.shape[0] not in (1, 3):
            x = x.permute(2, 0, 1)
        x = x if x.shape[0] in (1, 3) else x[:3] if x.shape[0] > 3 else x[:1]
        return x if min(x.shape[1:]) >= FEWEST_PIXELS else None
    if x.ndim == 4:
        return _as_image(x[:, x.shape[1] // 2] if x.shape[0] in (1, 3) else x[x.shape[0] // 2])
    return None


def _denormalized(image: Tensor, normalization: Normalization | None) -> Tensor | None:
    if normalization is None or not image.is_floating_point():
        return None
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in normalization)
    channels = image[None] if image.ndim == 2 else image
    if len(mean) not in (1, len(channels)):
        return None
    shown = channels.double() * std[:, None, None] + mean[:, None, None]
    return shown if float(shown.min()) >= -ROUNDING and float(shown.max()) <= 1 + ROUNDING else None


def _longest_text(sample: Any) -> str:
    parts = (
        list(sample.values())
        if isinstance(sample, Mapping)
        else sample
        if isinstance(sample, (list, tuple))
        else []
    )
    return max((part for part in parts if isinstance(part, str)), key=len, default="")


def _tokens(x: Tensor) -> str:
    more = f" ... {x.numel():,} in all" if x.numel() > TOKENS else ""
    return "tokens: " + " ".join(f"{value:.4g}" for value in x[:TOKENS].tolist()) + more


def _table(x: Tensor) -> str:
    lines = [f"{i}: {value:.4g}" for i, value in enumerate(x[:TABLE_VALUES].tolist())]
    return "\n".join([*lines, *([f"... {len(x):,} in all"] if len(x) > TABLE_VALUES else [])])


def sample_views(
    report: RepairReport,
    sources: Sequence[LoaderSource],
    render: Render | None = None,
    *,
    model: nn.Module,
) -> tuple[SampleView, ...]:
    """Returns views of the most clearly broken and repaired samples of each split. A sample may
    have no view.
    """
    convolves = any(isinstance(module, (nn.Conv2d, nn.Conv3d)) for module in model.modules())
    found: list[SampleView] = []
    by_split = {source.split: source for source in sources}
    try:
        for split in flipped_splits(report):
            telling = most_telling(split.flipped)
            chosen = [
                one
                for flip, n in VIEWED_SAMPLES.items()
                for one in [x for x in telling if x.flip == flip][:n]
            ]
            if chosen and split.split in by_split:
                found += _views(report, by_split[split.split], chosen, render, convolves)
    except (
        Exception
    ) as error:  # raised by the user's code; a missing picture must not end the repair
        problem = f"`render`: samples cannot be shown: {type(error).__name__}: {error}".partition(
            "\n"
        )[0]
        rank_zero_warn(
            DataWarning(
                f"{problem}.", "pass `data=DataOptions(render=f)` with f(sample) -> image or text."
            )
        )
    return tuple(found)


def _views(
    report: RepairReport,
    source: LoaderSource,
    samples: Sequence[FlippedSample],
    render: Render | None,
    convolves: bool,
) -> Iterator[SampleView]:
    normalization = find_normalization(source.samples) if render is None else None
    for one in samples:
        sample = source.samples[one.id]
        shown: Any = None
        if render is not None:
            shown = render(sample)
            shown = shown if isinstance(shown, str) else to_pixels(shown)
        else:
            args, kwargs, _ = source.adapter(source.loader.collate_fn([sample]))
            first = next(tensors_in((args, kwargs)), None)
            if first is not None and len(first):
                shown = display(first[0], sample, normalization, convolves=convolves)
        caption = caption_of(one, report.class_name)
        if isinstance(shown, str):
            yield SampleView(source.split, one.id, one.flip, caption, text=shown)
        elif shown is not None:
            yield SampleView(source.split, one.id, one.flip, caption, shown)


def class_names(sources: Iterable[LoaderSource]) -> tuple[str, ...]:
    """Returns the attribute `classes` (as in torchvision) of the first data set that has it, or an
    empty tuple.
    """
    for source in sources:
        for dataset in innermost_datasets(source.loader):
            found = getattr(dataset, "classes", None)
            if (
                isinstance(found, (list, tuple))
                and found
                and all(isinstance(name, str) for name in found)
            ):
                return tuple(found)
    return ()
