"""The local folder of a trainer's run, for loggers that have one and for those that have none."""

from __future__ import annotations

import os

from lightning_nrl._lightning.packages import Trainer


def run_folder(trainer: Trainer) -> str:
    """The log folder of the first logger, as in `Trainer.log_dir`; where it has none, a folder of its run.

    That of a run is `<save_dir>/<name>/<version>`, in which Lightning's checkpoints are too: loggers such as those of
    W&B and MLflow share one `save_dir` among all runs, and a second run would find the files of the first. To be called
    on all ranks; the first one's answer counts.
    """
    if not trainer.loggers:
        return str(trainer.default_root_dir)
    logger = trainer.loggers[0]
    folder = getattr(logger, "log_dir", None)
    if folder is None:
        version = f"version_{logger.version}" if isinstance(logger.version, int) else logger.version
        parts = [str(part) for part in (logger.name, version) if part is not None]
        folder = os.path.join(logger.save_dir or trainer.default_root_dir, *parts)
    return str(trainer.strategy.broadcast(str(folder)))
