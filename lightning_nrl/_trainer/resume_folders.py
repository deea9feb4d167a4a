"""Where a repair is saved while it works, and where one of an earlier run is looked for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lightning_nrl._lightning import Trainer, batch_limit
from lightning_nrl._trainer.artifacts import base_folder
from lightning_nrl._utils.saved_work import SavedWork


def saved_work(dirpath: str | Path | None, trainer: Trainer, every: float | None, name: str = "repair") -> SavedWork:
    """Saves in the folder of the repair's files; to be called on all ranks.

    A logger gives each run a folder of its own, so that the same call has another one: what an earlier run of the same
    logger has saved is found, too.

    Args:
        dirpath: the folder that the user named; None: that of the run.
        trainer: in a `fast_dev_run` nothing is saved.
        every: seconds between two times; None: nothing is saved.
        name: of the folder in that of the run.
    """
    if every is None or batch_limit(trainer):
        return SavedWork()
    parent = base_folder(dirpath, trainer, name)
    earlier: list[Path] = []
    if dirpath is None and trainer.loggers and trainer.is_global_zero:
        with suppress(OSError):
            others = [path for path in parent.parent.parent.glob(f"*/{parent.name}") if path != parent]
            earlier = sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
    return SavedWork(parent, earlier, every)
