"""Inputs of flipped samples as files beside a report, for TensorBoard's tab and for whoever looks into the folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from lightning_nrl.report.sample_views import SampleView

__all__ = ["SAMPLES_FOLDER", "SAMPLE_KINDS", "sample_name", "write_sample_files"]

SAMPLES_FOLDER = "flipped_samples"
"""Its name in the folder of the report."""
SAMPLE_KINDS = {"picture": ".png", "text": ".txt"}
"""How the names of files end."""


def sample_name(split: str, position: int, kind: str = "picture") -> str:
    """The name of the file that shows a sample, such as `test-17.png`; other splits have other names.

    Args:
        split: the split that it is in.
        position: that in the data set of the split.
        kind: one of `SAMPLE_KINDS`.
    """
    return f"{quote(split, safe='')}-{position}{SAMPLE_KINDS[kind]}"


def write_sample_files(folder: Path, views: Sequence[SampleView]) -> None:
    """Writes each view into `flipped_samples/` of this folder, which is made if need be."""
    samples = folder / SAMPLES_FOLDER
    if views:
        samples.mkdir(exist_ok=True)
    for view in views:
        if view.pixels is not None:
            (samples / sample_name(view.split, view.id)).write_bytes(view.png)
        else:
            (samples / sample_name(view.split, view.id, "text")).write_text(view.text, encoding="utf-8")
