"""A module that writes into its batch is counted by the labels that the batch came with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from digit_models import quick_repair, quiet_trainer
from lightning_package import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_nrl.callbacks import RegressionMetrics

Fields = dict[str, Tensor]


class Writer(LightningModule):
    """Writes its prediction into the batch under the name of the labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)

    def forward(self, batch: Fields) -> Tensor:
        logits = self.net(batch["x"])
        batch["y"] = logits.argmax(1)
        return logits

    def training_step(self, batch: Fields, batch_idx: int) -> Tensor:
        y = batch["y"]
        return F.cross_entropy(self(batch), y)

    def validation_step(self, batch: Fields, batch_idx: int) -> None:
        self(batch)

    def predict_step(self, batch: Fields, batch_idx: int) -> Tensor:
        return 2 * self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def loader(seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 4, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return DataLoader([{"x": x[i], "y": y[i]} for i in range(60)], batch_size=20)


def test_a_written_label_counts_for_nothing(tmp_path):
    model = Writer()
    truth = list(loader(1).dataset)
    x, y = (torch.stack([sample[name] for sample in truth]) for name in "xy")
    accuracy = float((model.net(x).argmax(1) == y).float().mean())
    callback, metrics = quick_repair(), RegressionMetrics(Writer())
    trainer = quiet_trainer(tmp_path, metrics, callback, max_epochs=1)
    trainer.fit(model, loader(0), loader(1))
    assert float(trainer.callback_metrics["regression/accuracy"]) == pytest.approx(accuracy)
    (counts,) = [split.counts for split in callback.report.splits if split.split == "val"]
    assert counts.passed == round(60 * accuracy)
