"""A training with its record, and with repairs in it, on two processes, for `test_training_history.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from digit_models import Digits, quiet_trainer
from distributed_fit import Frozen
from torch.utils.data import DataLoader, Subset

from lightning_nrl import RepairInTraining, TrainingHistory


class Odd(Digits):
    """As many training samples as two processes cannot share evenly, so that one is there twice."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Subset(self.train, range(101)), 8, shuffle=True)


def on_rank(folder: Path) -> None:
    history = TrainingHistory(["train", "val", "repair"], layers="all", dirpath=folder / "history")
    when = {"every_n_epochs": 1, "monitor": "val_loss", "min_delta": 1000.0, "at_end": False}
    repair = RepairInTraining(**when, method="convex", dirpath=folder / "files", verbose=False)
    trainer = quiet_trainer(folder, history, repair, devices=2, strategy="ddp", max_epochs=2)
    # Only repairs move its weights, so that what each sample met in training can be found again.
    model = Frozen()
    trainer.fit(model, datamodule=Odd())
    torch.save(model.state_dict(), folder / f"rank{trainer.global_rank}.pt")
    # The repaired model was validated once more, on both ranks.
    assert repair._best == float(trainer.callback_metrics["val_loss"])
