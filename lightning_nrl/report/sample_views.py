"""What a reviewer is shown of a flipped sample: its input as a picture or as text, with a caption."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

import numpy as np
import numpy.typing as npt

from lightning_nrl.report._formatting import number
from lightning_nrl.report.sample_records import Flip, FlippedSample

__all__ = ["SampleView", "caption_of"]


@dataclass(frozen=True, eq=False)
class SampleView:
    """The input of a flipped sample, to be looked at.

    Attributes:
        split: the split that it is in.
        id: its position in the data set of that split.
        flip: whether it was repaired or broken.
        caption: what it is, was and is taken for.
        pixels: `height x width x 3` uint8; None where it is shown as text.
        text: what stands for a picture.
    """

    split: str
    id: int
    flip: Flip
    caption: str
    pixels: npt.NDArray[np.uint8] | None = None
    text: str = ""

    @cached_property
    def png(self) -> bytes:
        """The picture as a PNG file."""
        from PIL import Image

        held = BytesIO()
        assert self.pixels is not None
        Image.fromarray(self.pixels).save(held, "PNG")
        return held.getvalue()

    @property
    def data_uri(self) -> str:
        """The picture as a part of a page."""
        return f"data:image/png;base64,{b64encode(self.png).decode()}"


def caption_of(sample: FlippedSample, name: Callable[[int], str]) -> str:
    """The sample's position, its class, what it was and is taken for, and its margins."""
    taken = f"{name(sample.predicted_before)} -> {name(sample.predicted_after)}"
    margins = f"{number(sample.margin_before)} -> {number(sample.margin_after)}"
    return f"{sample.id}: true {name(sample.label)}, {taken}, margin {margins}"
