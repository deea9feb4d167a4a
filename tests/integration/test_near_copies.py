"""Held-out frames of a video are near-copies of used ones: the report of a fit says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Classifier, Digits, quiet_trainer
from torch.utils.data import TensorDataset

from lightning_nrl import ParticleSwarm, RegressionFreeRepair, RepairReport, SampleOptions
from lightning_nrl.methods import Auto


class Videos(Digits):
    """Each image to repair is a video of five frames in order, whose number is the last column."""

    def __init__(self) -> None:
        super().__init__()
        images, labels, _ = (part[:60].repeat_interleave(5, 0) for part in self.repair.tensors)
        generator = torch.Generator().manual_seed(2)
        images = images + 0.05 * torch.randn(images.shape, generator=generator)
        self.repair = TensorDataset(images, labels, torch.arange(300) // 5)
        images, labels, _ = self.train.tensors
        self.train = TensorDataset(images, labels, 100 + torch.arange(len(labels)))


def fitted(folder: Path, data: Digits, **options: Any) -> RepairReport:
    repair = RegressionFreeRepair(
        method=Auto(ParticleSwarm(particles=12, iterations=8)),
        samples=SampleOptions(**options),
        verbose=False,
    )
    quiet_trainer(folder, repair, max_epochs=8).fit(Classifier(), data)
    assert repair.report is not None
    assert repair.report.held_out is not None
    return repair.report


@pytest.mark.parametrize(
    ("data", "options", "warns"),
    [(Videos, {}, True), (Videos, {"groups": 2}, False), (Digits, {}, False)],
)
def test_near_copies_are_named(tmp_path, data, options, warns):
    report = fitted(tmp_path, data(), **options)
    assert report.near_copies == warns
    assert ("HINT: say which samples belong together" in report.to_markdown()) == warns
    assert report.held_out is not None
    groups = report.held_out.groups
    assert (groups is not None) == bool(options)
    if groups is not None:
        # Whole videos of five frames are held out.
        assert report.held_out.n % 5 == 0
        assert groups.passed <= report.held_out.n / 5
