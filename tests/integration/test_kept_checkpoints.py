"""Apricot by its name in a Trainer: it takes what `ModelCheckpoint` has kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from digit_models import Classifier, Digits, quick_repair, quiet_trainer
from lightning_package import ModelCheckpoint

from lightning_nrl.errors import ConfigurationError


def test_the_best_checkpoints_of_the_trainer_are_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kept = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_top_k=3)
    repair = quick_repair(method="apricot")
    quiet_trainer(tmp_path, kept, repair, max_epochs=4).fit(Classifier(), datamodule=Digits())
    assert repair.report is not None
    assert repair.report.settings["method"]["checkpoints"] == sorted(kept.best_k_models)
    assert "checkpoints, right on" in repair.report.steps[0].note
    assert repair.report.pooled("known").counts.broken == 0


def test_without_any_it_says_so_before_training(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, quick_repair(method="apricot"), enable_checkpointing=False)
    with pytest.raises(ConfigurationError, match=r"`Apricot.checkpoints`: there will be none\."):
        trainer.fit(Classifier(), datamodule=Digits())
    assert trainer.global_step == 0
