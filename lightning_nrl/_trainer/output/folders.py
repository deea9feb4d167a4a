"""Chooses and checks the folders of reports and of saved steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lightning_nrl._trainer.lightning.packages import Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import batch_limit
from lightning_nrl._trainer.output.repair_files import (
    REPAIRED_FILES,
    foreign_file,
    refuse_foreign,
    short_message,
)
from lightning_nrl._trainer.tracking.repair_log import next_free
from lightning_nrl._utils.atomic_files import obstacle_of
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl.errors import ConfigurationError, LoggingWarning, UnwritableFolderError


def base_folder(dirpath: str | Path | None, trainer: Trainer, name: str) -> Path:
    """Returns `dirpath`, or by default the folder `name` in the log folder of the run.

    All ranks must call it. The log folder is the folder of the first logger, or `default_root_dir`
    without loggers. W&B and MLflow share one `save_dir` among all runs, so their log folder is
    `<save_dir>/<logger.name>/<logger.version>`.
    """
    folder = _log_folder(trainer) if dirpath is None else str(dirpath)
    if "://" in folder:
        raise ConfigurationError(
            f"`dirpath`: the files of a {name} cannot go to '{folder}', which is no local folder.",
            "pass a local folder as `dirpath=`, and copy it where it should be.",
        )
    return Path(folder) / name if dirpath is None else Path(folder)


def _log_folder(trainer: Trainer) -> str:
    root = trainer.default_root_dir
    if not trainer.loggers:
        return str(root)
    logger = trainer.loggers[0]
    try:
        folder = logger.log_dir
        if folder is None:
            version = logger.version
            if isinstance(version, int):
                version = f"version_{version}"
            parts = [str(part) for part in (logger.name, version) if part is not None]
            folder = os.path.join(logger.save_dir or root, *parts)
    except Exception as error:  # such as a store that MLflow cannot open
        folder = root
        rank_zero_warn(
            LoggingWarning(
                f"{type(logger).__name__} has no folder ({short_message(error)}); "
                f"the files are written below {folder}.",
                "set `dirpath=`, or check the logger's settings.",
            )
        )
    return trainer.strategy.broadcast(str(folder))


def check_folder(
    dirpath: str | Path | None,
    trainer: Trainer,
    name: str = "repair",
    files: Mapping[str, str] = REPAIRED_FILES,
) -> None:
    """Refuses a folder (see `base_folder`) that cannot be written to or has files of the user.

    These are other files at the names in `files`. All ranks must call it, before any work.
    """
    folder = base_folder(dirpath, trainer, name)
    obstacle = "" if batch_limit(trainer) else obstacle_of(folder)
    if obstacle := trainer.strategy.broadcast(obstacle):
        raise UnwritableFolderError(
            f"`dirpath`: {folder} cannot be written to; the obstacle is {obstacle}.",
            "name another folder as `dirpath=`.",
        )
    if dirpath is None:
        folder = next_free(folder, "report.json")
    foreign = "" if batch_limit(trainer) else foreign_file(folder, files.values())
    refuse_foreign(trainer.strategy.broadcast(foreign), "dirpath")


def report_files(
    dirpath: str | Path | None, trainer: Trainer, name: str, files: Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """Returns the paths of a report's files by kind, and the name of the report in logs.

    All ranks must call it. Without `dirpath`, the folder is the first of `name`, `name-1`, ... in
    the log folder that has no report, and the name in logs is the name of the folder. In a
    `fast_dev_run`, no paths are returned, since nothing is written.
    """
    if batch_limit(trainer):
        return {}, name
    folder = base_folder(dirpath, trainer, name)
    if trainer.is_global_zero:
        with suppress(OSError):  # `SavedFiles` reports it
            if dirpath is None:
                folder = next_free(folder, "report.json")
            folder.mkdir(parents=True, exist_ok=True)
    folder = Path(trainer.strategy.broadcast(str(folder)))
    paths = {kind: str(folder / file) for kind, file in files.items()}
    return paths, folder.name if dirpath is None else name


def resume_store(
    dirpath: str | Path | None, trainer: Trainer, every: float | None, name: str
) -> ResumeStore:
    """Returns a store for results of steps of `every` seconds or more (None: no results).

    All ranks must call it.
    """
    if every is None or batch_limit(trainer):
        return ResumeStore()
    parent = base_folder(dirpath, trainer, name)
    earlier = []
    if dirpath is None and trainer.loggers and trainer.is_global_zero:
        with suppress(OSError):
            folders = set(parent.parent.parent.glob(f"*/{parent.name}")) - {parent}
            earlier = sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)
    return ResumeStore(parent, earlier, every)
