"""A training with its record on two processes, for `test_training_history.py`."""

from __future__ import annotations

from pathlib import Path

from digit_models import Classifier, Digits, quiet_trainer

from lightning_nrl.callbacks import TrainingHistory


def on_rank(folder: Path) -> None:
    history = TrainingHistory(["val", "repair"], layers="all", dirpath=folder / "history")
    trainer = quiet_trainer(folder, history, devices=2, strategy="ddp", max_epochs=2)
    trainer.fit(Classifier(), datamodule=Digits())
