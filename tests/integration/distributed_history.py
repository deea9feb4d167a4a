"""A training with its record on two processes, for `test_training_history.py`."""

from __future__ import annotations

from pathlib import Path

from digit_models import Digits, quiet_trainer
from distributed_fit import Frozen
from torch.utils.data import DataLoader, Subset

from lightning_nrl.callbacks import TrainingHistory


class Odd(Digits):
    """As many training samples as two processes cannot share evenly, so that one is there twice."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Subset(self.train, range(101)), 8, shuffle=True)


def on_rank(folder: Path) -> None:
    history = TrainingHistory(["train", "val", "repair"], layers="all", dirpath=folder / "history")
    trainer = quiet_trainer(folder, history, devices=2, strategy="ddp", max_epochs=2)
    # Its weights do not move, so that what each sample met in training can be found again.
    trainer.fit(Frozen(), datamodule=Odd())
