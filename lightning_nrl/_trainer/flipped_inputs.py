"""Inputs of the samples that a repair flipped, read once more and made pictures or text for a reviewer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning_nrl._lightning.packages import rank_zero_warn
from lightning_nrl._trainer.loaders import LoaderSource
from lightning_nrl._trainer.sample_display import display, find_normalization, to_pixels
from lightning_nrl.data.batch import tensors_in
from lightning_nrl.errors import DataWarning
from lightning_nrl.report import RepairReport
from lightning_nrl.report.sample_views import SampleView, caption_of
from lightning_nrl.report.splits import FlippedSample
from lightning_nrl.report.tables import flipped_splits, most_telling

Render = Callable[[Any], Any]
"""Takes one sample as the data set gives it; gives an image (see `to_pixels`) or text."""

VIEWED_SAMPLES = {"broken": 24, "repaired": 12}
"""Of each split, at most."""


def sample_views(
    report: RepairReport, sources: Sequence[LoaderSource], render: Render | None = None
) -> tuple[SampleView, ...]:
    """Views of the broken samples and of the most telling repaired ones, of each split.

    Without `render` the model's input is shown, see `display`. What cannot be read or rendered is left out, with one
    warning.

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
                shown = display(first[0], sample, normalization)
        caption = caption_of(one, report.class_name)
        if isinstance(shown, str):
            yield SampleView(source.split, one.id, one.flip, caption, text=shown)
        elif shown is not None:
            yield SampleView(source.split, one.id, one.flip, caption, shown)
