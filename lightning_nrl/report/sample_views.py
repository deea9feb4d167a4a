"""Inputs of flipped samples as pictures or text with captions, on pages and as files."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from lightning_nrl._utils.formatting import number, titled
from lightning_nrl.records.splits import Flip, FlippedSample

SAMPLES_FOLDER = "flipped_samples"  # in the folder of the report
SAMPLE_KINDS = {"picture": ".png", "text": ".txt"}


@dataclass(frozen=True, eq=False)
class SampleView:
    """The input of the flipped sample at position `id`, as pixels or text.

    Pixels have the shape `height x width x 3`.
    """

    split: str
    id: int
    flip: Flip
    caption: str
    pixels: npt.NDArray[np.uint8] | None = None
    text: str = ""

    @property
    def png(self) -> bytes:
        from PIL import Image

        file = BytesIO()
        assert self.pixels is not None
        Image.fromarray(self.pixels).save(file, "PNG")
        return file.getvalue()

    @property
    def data_uri(self) -> str:
        return f"data:image/png;base64,{b64encode(self.png).decode()}"


def by_flip(views: Sequence[SampleView]) -> dict[str, list[SampleView]]:
    """Groups views under titles such as `broken in test`."""
    groups: dict[str, list[SampleView]] = {}
    for view in views:
        groups.setdefault(f"{view.flip} in {view.split}", []).append(view)
    return groups


def caption_of(sample: FlippedSample, class_name: Callable[[int], str]) -> str:
    """Returns the sample's position, name, class, predictions and margins as text."""
    before, after = class_name(sample.predicted_before), class_name(sample.predicted_after)
    margins = f"{number(sample.margin_before)} -> {number(sample.margin_after)}"
    title = titled(sample.id, sample.name)
    return f"{title}: true {class_name(sample.label)}, {before} -> {after}, margin {margins}"


def sample_name(split: str, position: int, kind: str) -> str:
    """Returns the file name of a sample, such as `test-17.png`; `kind` is in `SAMPLE_KINDS`."""
    return f"{quote(split, safe='')}-{position}{SAMPLE_KINDS[kind]}"


def write_sample_files(folder: Path, views: Sequence[SampleView]) -> None:
    """Writes each view to a file in the subfolder `flipped_samples`."""
    samples = folder / SAMPLES_FOLDER
    if views:
        samples.mkdir(exist_ok=True)
    for view in views:
        kind, content = "text", view.text.encode()
        if view.pixels is not None:
            kind, content = "picture", view.png
        (samples / sample_name(view.split, view.id, kind)).write_bytes(content)
