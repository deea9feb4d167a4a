"""A network with one logit for two classes, as Lightning's own example of transfer learning has it,
in a Trainer.
"""

from __future__ import annotations

from typing import Any

import torch
from digit_models import digits, quiet_trainer
from lightning_package import LightningModule, seed_everything
from task_models import Data, dim
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import BinaryAccuracy

from lightning_nrl import (
    OldModel,
    PositiveCongruentTraining,
    RegressionFreeRepair,
    RegressionMetrics,
    RepairReport,
    Target,
    repair,
)


class Transfer(LightningModule):
    """Lightning's `TransferLearningModel`, with a smaller backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()
        )
        self.fc = nn.Sequential(nn.Linear(216, 16), nn.ReLU(), nn.Linear(16, 1))
        self.train_acc, self.valid_acc = BinaryAccuracy(), BinaryAccuracy()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.feature_extractor(x))

    def step(self, batch: Any, accuracy: BinaryAccuracy) -> Tensor:
        x, y = batch
        logits, truth = self(x), y.view((-1, 1)).type_as(x)
        accuracy(torch.sigmoid(logits), truth.int())
        return F.binary_cross_entropy_with_logits(logits, truth)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, self.train_acc)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch, self.valid_acc))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def data() -> Data:
    images, labels = digits()
    found = Data(images, (labels >= 5).long(), dim)
    found.val_dataloader = found.repair_dataloader
    return found


@torch.no_grad()
def right(model: Transfer, part: Any) -> Tensor:
    x, y = part.tensors
    return (model.eval()(x)[:, 0] > 0) == y.bool()


def check_counts(report: RepairReport, model: Transfer, own: Data) -> None:
    for split in report.splits:
        assert split.kept + split.repaired == int(right(model, getattr(own, split.split)).sum())
        assert not split.broken or split.role == "unseen"


def test_the_task_is_found(tmp_path):
    seed_everything(0, verbose=False)
    model, digit_pairs = Transfer(), data()
    quiet_trainer(tmp_path, max_epochs=2).fit(model, datamodule=digit_pairs)
    report = repair(
        quiet_trainer(tmp_path),
        model,
        datamodule=digit_pairs,
        method="convex",
        target=Target.label(1),
        unseen="test",
        verbose=False,
    )
    assert report.status == "repaired", report.reason
    check_counts(report, model, digit_pairs)


def test_updates_are_counted_held_to_the_old_model_and_repaired(tmp_path):
    seed_everything(0, verbose=False)
    old, new, own = Transfer(), Transfer(), data()
    quiet_trainer(tmp_path).fit(old, datamodule=own)
    callback = RegressionFreeRepair(method="convex", reference=old, verbose=False)
    reference = OldModel(old, classes=(["no", "yes"], ["no", "yes"]))
    callbacks = [
        RegressionMetrics(old),
        PositiveCongruentTraining(reference, ["focal_distillation", "margin_hinge"]),
    ]
    trainer = quiet_trainer(tmp_path, *callbacks, callback)
    trainer.fit(new, datamodule=own)
    assert trainer.callback_metrics["regression/focal_distillation"].isfinite()
    check_counts(callback.report, new, own)
    was, now = right(old, own.repair), right(new, own.repair)
    (split,) = (split for split in callback.report.update if split.split == "repair")
    assert split.final.broken == int((was & ~now).sum())
