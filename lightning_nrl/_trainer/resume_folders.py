"""Folders where a repair saves finished steps, and where those of earlier runs are found."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lightning_nrl._lightning.packages import Trainer
from lightning_nrl._lightning.private_parts import batch_limit
from lightning_nrl._trainer.artifacts import base_folder
from lightning_nrl._utils.saved_work import ResumeStore


def saved_work(dirpath: str | Path | None, trainer: Trainer, every: float | None, name: str = "repair") -> ResumeStore:
    """Returns a store in the folder of the repair's files. To be called on all ranks.

    A logger makes a new folder for each run, so those of earlier runs are searched too.

    Args:
        dirpath: the folder that the user named; None: that of the run.
        trainer: in a `fast_dev_run` nothing is saved.
        every: seconds that a step takes at least to be saved; None: nothing is saved.
        name: of the folder in that of the run.
    """
    if every is None or batch_limit(trainer):
        return ResumeStore()
    parent = base_folder(dirpath, trainer, name)
    earlier: list[Path] = []
    if dirpath is None and trainer.loggers and trainer.is_global_zero:
        with suppress(OSError):
            others = [path for path in parent.parent.parent.glob(f"*/{parent.name}") if path != parent]
            earlier = sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
    return ResumeStore(parent, earlier, every)
