"""A diagnosis on two processes, for `test_diagnose_call.py`."""

from __future__ import annotations

from pathlib import Path

from digit_models import Classifier, Digits, quiet_trainer

from lightning_nrl import diagnose


def on_rank(folder: Path, checkpoint: Path) -> None:
    trainer = quiet_trainer(folder, devices=2, strategy="ddp")
    found = diagnose(trainer, Classifier(), datamodule=Digits(), ckpt_path=checkpoint)
    (folder / f"{trainer.global_rank}.json").write_text(found.to_json())
