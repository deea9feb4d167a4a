"""Held-out frames of a video are near-copies of used ones: the report of a fit says so."""

from __future__ import annotations

import torch
from digit_models import Classifier, Digits, quiet_trainer
from torch.utils.data import TensorDataset

from lightning_nrl import ParticleSwarm, RegressionFreeRepair
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


def test_near_copies_are_named(tmp_path):
    repair = RegressionFreeRepair(
        method=Auto(ParticleSwarm(particles=12, iterations=8)), verbose=False
    )
    quiet_trainer(tmp_path, repair, max_epochs=8).fit(Classifier(), Videos())
    assert repair.report.near_copies
    assert "HINT: say which samples belong together" in repair.report.to_markdown()
