"""What a repair leaves on disk and on the screen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_nrl._lightning import batch_limit
from lightning_nrl._tracking import outcome, track
from lightning_nrl.errors import ConfigurationError, explain
from lightning_nrl.release import ReleaseReport
from lightning_nrl.report import RepairReport
from lightning_nrl.report.document import Shown

__all__ = ["base_folder", "file_names", "output_folder", "publish", "show", "with_files", "write_report"]


def base_folder(dirpath: str | Path | None, trainer: pl.Trainer, name: str = "repair") -> Path:
    """The folder that the user named, or one of this name in the log folder.

    Raises:
        ConfigurationError: it is not on this machine's file system.
    """
    found = dirpath if dirpath is not None else trainer.log_dir or trainer.default_root_dir  # asks all ranks
    if "://" in str(found):
        raise ConfigurationError(
            explain(
                f"`dirpath`: the files of a {name} cannot go to '{found}', which is no local folder.",
                "pass a local folder as `dirpath=`, and copy it where it should be.",
            )
        )
    return Path(found) if dirpath is not None else Path(found) / name


def output_folder(dirpath: str | Path | None, trainer: pl.Trainer, name: str = "repair") -> Path | None:
    """The folder for the files of a repair, made on the first rank, the same on all.

    Args:
        dirpath: the folder that the user named; None: `name` in the log folder, or the next free of `name-1`,
            `name-2` ... where an earlier one has left its report.
        trainer: knows the log folder.
        name: what is done, in a word.

    Returns:
        None in a `fast_dev_run`, which writes nothing.
    """
    if batch_limit(trainer):
        return None
    folder = base_folder(dirpath, trainer, name)
    if trainer.is_global_zero:
        free, k = folder, 0
        while dirpath is None and (free / "report.json").exists():
            k += 1
            free = folder.with_name(f"{folder.name}-{k}")
        folder = free
        folder.mkdir(parents=True, exist_ok=True)
    return Path(trainer.strategy.broadcast(str(folder)))


def file_names(folder: Path | None, *, checkpoint: bool) -> dict[str, str]:
    """The files of a repair by kind: the checkpoint if there is one, `json` and `markdown`."""
    names = {"checkpoint": "repaired.ckpt", "json": "report.json", "markdown": "report.md"}
    if folder is None:
        return {}
    return {kind: str(folder / name) for kind, name in names.items() if checkpoint or kind != "checkpoint"}


def write_report(report: RepairReport | ReleaseReport) -> None:
    """Writes the report to the files that it names."""
    for kind, text in (("json", report.to_json()), ("markdown", report.to_markdown())):
        if kind in report.files:
            Path(report.files[kind]).write_text(text, encoding="utf-8")


def show(report: Shown) -> None:
    """Prints the report: as a rich table where rich is installed, else as plain text."""
    try:
        from rich import get_console
    except ImportError:
        print(report.render())
    else:
        get_console().print(report.to_table())


def with_files(
    report: RepairReport, dirpath: str | Path | None, trainer: pl.Trainer, *, accepted: bool
) -> tuple[RepairReport, str]:
    """The report with the names of its files, and the name that it has in logs.

    A second repair in one log gets tags of its own, as it gets a folder of its own.
    """
    folder = output_folder(dirpath, trainer)
    name = folder.name if folder is not None and dirpath is None else "repair"
    return replace(report, files=file_names(folder, checkpoint=accepted)), name


def publish(report: RepairReport, trainer: pl.Trainer, name: str, *, change: Tensor | None, verbose: bool) -> None:
    """Saves the checkpoint, writes the files, logs and prints.

    Args:
        report: with the names of its files.
        trainer: whose callbacks put the repaired weights into the checkpoint.
        name: what tags begin with.
        change: the change of each weight that differs.
        verbose: whether the report is printed.
    """
    if "checkpoint" in report.files:
        trainer.save_checkpoint(report.files["checkpoint"], weights_only=False)
    if trainer.is_global_zero:
        write_report(report)
        track(report, trainer.loggers, step=trainer.global_step, change=change, name=name)
        if verbose:
            show(report)
    trainer.callback_metrics.update(headline(report, name))


def headline(report: RepairReport, name: str) -> dict[str, Tensor]:
    """What `trainer.callback_metrics` gets, named as in the logs; it outlives processes that a strategy has started."""
    return {tag: torch.tensor(value) for tag, value in outcome(report, name).items()}
