"""How flipped samples are shown to a reader: the user's way, else as an image, a table or a text."""

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
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SampleView, caption_of
from lightning_nrl.report.splits import FlippedSample
from lightning_nrl.report.tables import flipped_splits, most_telling

Render = Callable[[Any], Any]
"""Takes one sample as the data set gives it; gives an image (see `to_pixels`) or text."""
Pixels = npt.NDArray[np.uint8]
Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Means and standard deviations of channels, by which a data set has normalised its images."""

FEWEST_PIXELS = 4  # a side of less is no picture
TABLE_VALUES, TOKENS = 24, 120  # more are not listed
ROUNDING = 0.02  # by which a normalisation that was found may miss [0, 1]
DEEPEST, MOST_VISITED = 12, 200
VIEWED_SAMPLES = {"broken": 24, "repaired": 12}
"""Of each split, at most."""


def display(
    x: Tensor, sample: Any = None, normalization: Normalization | None = None, *, convolves: bool = True
) -> Pixels | str | None:
    """A model's input for one sample as an image, `height x width x 3`, or text; None for what cannot be shown.

    Whole numbers in a row are tokens, others a table. All else is an image if the model convolves in two dimensions,
    if it has one or three channels, or if it is of bytes: a series of features is none. Of more than three channels it
    shows the first three, of a film the middle; not normalized, it is stretched from black to white.
    """
    x = x.detach().cpu()
    if x.is_complex() or not x.numel():
        return None
    if x.ndim == 1 and not (x.is_floating_point() or x.dtype == torch.bool):
        return _words(sample) or _tokens(x)
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
    """An image as `height x width x 3` uint8; None for what is none.

    It has 1 or 3 channels first or last, or none, in uint8 or in [0, 1], or is `stretched` from black to white.
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
    """The last `Normalize` in a data set's attributes and in the data sets that it wraps, as torchvision has them."""
    found: Normalization | None = None
    for one in _parts(dataset):
        if type(one).__name__ == "Normalize":  # of whatever library
            mean, std = (_numbers(getattr(one, name, None)) for name in ("mean", "std"))
            if mean and std and len(mean) == len(std):
                found = mean, std
    return found


def _parts(dataset: object) -> Iterator[object]:
    """An object, and what lies in its attributes, lists and mappings, not for ever deep."""
    seen: set[int] = set()
    waiting: list[tuple[object, int]] = [(dataset, 0)]
    while waiting and len(seen) < MOST_VISITED:
        one, depth = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if depth < DEEPEST:
            inside = one if isinstance(one, (list, tuple)) else list(getattr(one, "__dict__", {}).values())
            few = inside if len(inside) <= MOST_VISITED else ()  # samples, no transforms
            parts = (part for part in few if not isinstance(part, (Tensor, type, str)))
            waiting += [
                (part, depth + 1) for part in parts if isinstance(part, (list, tuple)) or hasattr(part, "__dict__")
            ]


def _numbers(values: Any) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in (values if isinstance(values, (Sequence, Tensor)) else [values]))
    except (TypeError, ValueError):
        return ()


def _as_image(x: Tensor) -> Tensor | None:
    """`height x width`, or `1 or 3 x height x width`, of whatever has height and width."""
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
    """The image in [0, 1]; None if that normalisation cannot be its own."""
    if normalization is None or not image.is_floating_point():
        return None
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in normalization)
    channels = image[None] if image.ndim == 2 else image
    if len(mean) not in (1, len(channels)):
        return None
    shown = channels.double() * std[:, None, None] + mean[:, None, None]
    return shown if float(shown.min()) >= -ROUNDING and float(shown.max()) <= 1 + ROUNDING else None


def _words(sample: Any) -> str:
    """The longest text that a sample holds."""
    parts = (
        list(sample.values()) if isinstance(sample, Mapping) else sample if isinstance(sample, (list, tuple)) else []
    )
    return max((part for part in parts if isinstance(part, str)), key=len, default="")


def _tokens(x: Tensor) -> str:
    more = f" ... {x.numel():,} in all" if x.numel() > TOKENS else ""
    return "tokens: " + " ".join(f"{value:.4g}" for value in x[:TOKENS].tolist()) + more


def _table(x: Tensor) -> str:
    lines = [f"{i}: {value:.4g}" for i, value in enumerate(x[:TABLE_VALUES].tolist())]
    return "\n".join([*lines, *([f"... {len(x):,} in all"] if len(x) > TABLE_VALUES else [])])


def sample_views(
    report: RepairReport, sources: Sequence[LoaderSource], render: Render | None = None, *, model: nn.Module
) -> tuple[SampleView, ...]:
    """Views of the broken and the most telling repaired samples of each split; what cannot be rendered is left out."""
    convolves = any(isinstance(module, (nn.Conv2d, nn.Conv3d)) for module in model.modules())
    found: list[SampleView] = []
    by_split = {source.split: source for source in sources}
    try:
        for split in flipped_splits(report):
            telling = most_telling(split.flipped)
            chosen = [one for flip, n in VIEWED_SAMPLES.items() for one in [x for x in telling if x.flip == flip][:n]]
            if chosen and split.split in by_split:
                found += _views(report, by_split[split.split], chosen, render, convolves)
    except Exception as error:  # the user's data set or function; no picture is worth a repair
        problem = f"`render`: samples cannot be shown: {type(error).__name__}: {error}".partition("\n")[0]
        rank_zero_warn(DataWarning(f"{problem}.", "pass `data=DataOptions(render=f)` with f(sample) -> image or text."))
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
    """The first `classes` of an innermost data set, as torchvision's have them; empty where none has any."""
    for source in sources:
        for dataset in innermost_datasets(source.loader):
            found = getattr(dataset, "classes", None)
            if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
                return tuple(found)
    return ()
