"""A sweep on two processes, for `test_sweep_call.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from digit_models import QUICK, Classifier, Digits, quiet_trainer

from lightning_nrl import Grid, sweep

SWEEP: dict[str, Any] = {
    "settings": Grid(fitness=["eq1", "lexicographic"], n_passed=[100], particles=[15]),
    "seeds": 3,
    "method": QUICK["method"],
    "search": QUICK["search"],
}


def on_rank(folder: Path, checkpoint: Path) -> None:
    trainer = quiet_trainer(folder, devices=2, strategy="ddp")
    found = sweep(trainer, Classifier(), datamodule=Digits(), ckpt_path=checkpoint, **SWEEP)
    (folder / f"{trainer.global_rank}.json").write_text(found.to_json())
    torch.save(found.state(found.runs[-1]), folder / f"{trainer.global_rank}.pt")
