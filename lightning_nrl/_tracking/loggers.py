"""One report to all loggers of a trainer. Logging comes last and must never cost the repair, or the decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lightning_nrl._lightning.packages import (
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
    rank_zero_only,
    rank_zero_warn,
)
from lightning_nrl._tracking.history_figures import history_figures
from lightning_nrl._tracking.mlflow_run import upload_to_mlflow, write_mlflow
from lightning_nrl._tracking.repair_hparams import declare_columns
from lightning_nrl._tracking.repair_log import RepairLog, written
from lightning_nrl._tracking.scalars import Scalars
from lightning_nrl._tracking.tensorboard import write_tensorboard
from lightning_nrl._tracking.wandb_run import upload_to_wandb, write_wandb
from lightning_nrl.errors import LoggingWarning
from lightning_nrl.localization import TrainingRecord
from lightning_nrl.release import ReleaseReport
from lightning_nrl.report._figures import image_of

RUNS: Mapping[Any, tuple[Callable[[RepairLog, Any], None], Callable[[Mapping[str, Path], Any, str, int], None]]] = {
    WandbLogger: (write_wandb, upload_to_wandb),
    MLFlowLogger: (write_mlflow, upload_to_mlflow),
}
"""Loggers that take more than numbers: what writes a repair, and what uploads files."""


@rank_zero_only
def track(log: RepairLog, loggers: Sequence[Logger]) -> None:
    """Writes a repair to every logger, on rank zero; what each of them takes is in its module.

    The search has its iterations for steps, the way to the patch its strength in percent; all other numbers stand at
    the step of training at which the repair was made.
    """
    to_each(loggers, partial(_write, log), "repair")


@rank_zero_only
def declare(loggers: Sequence[Logger], hparams: Mapping[str, Any]) -> None:
    """Has TensorBoard's HParams tab show a repair beside training, which is about to log these hyperparameters."""

    def write(logger: Logger) -> None:
        if writer := writer_of(logger):
            declare_columns(writer, hparams)

    to_each(loggers, write, "row of hyperparameters")


@rank_zero_only
def track_release(report: ReleaseReport, loggers: Sequence[Logger], *, step: int, name: str = "release") -> None:
    """Writes the page of a release decision to every logger that takes one; its numbers go with the metrics."""

    def write(logger: Logger) -> None:
        if writer := writer_of(logger):
            writer.add_text(f"{name}/report", report.to_markdown(), step)
        _upload(written(report.files), logger, name, step)
        logger.save()

    to_each(loggers, write, "release report")


@rank_zero_only
def track_numbers(numbers: Scalars, loggers: Sequence[Logger], *, step: int, what: str) -> None:
    """Writes numbers by tag to every logger, on rank zero; `what` they are of is for the warning."""

    def write(logger: Logger) -> None:
        logger.log_metrics(numbers, step=step)
        logger.save()

    to_each(loggers, write, what)


@rank_zero_only
def track_history(record: TrainingRecord, loggers: Sequence[Logger], *, step: int, name: str) -> None:
    """Writes figures of each split of a training's record to TensorBoard; nothing without matplotlib."""

    def write(logger: Logger) -> None:
        if writer := writer_of(logger):
            for split in record.splits:
                for title, figure in history_figures(record, split).items():
                    writer.add_image(f"{name}_figures/{title}", image_of(figure), step, dataformats="HWC")
            logger.save()

    if find_spec("matplotlib") is not None:
        to_each(loggers, write, "history of the training")


def writer_of(logger: Logger) -> SummaryWriter | None:
    """TensorBoard's writer; None for any other logger."""
    writer = logger.experiment if isinstance(logger, TensorBoardLogger) else None
    return writer if isinstance(writer, SummaryWriter) else None


def to_each(loggers: Sequence[Logger], write: Callable[[Logger], None], what: str) -> None:
    """Writes to every logger; one that raises is warned of and left, the others go on."""
    for logger in loggers:
        try:
            write(logger)
        except Exception as error:
            rank_zero_warn(
                f"The {what} was not logged to {type(logger).__name__}, which raised {type(error).__name__}: {error}. "
                f"The {what} itself and its files are not affected.",
                category=LoggingWarning,
            )


def _write(log: RepairLog, logger: Logger) -> None:
    if writer := writer_of(logger):
        write_tensorboard(log, writer)
    elif not isinstance(logger, MLFlowLogger):  # which takes many at once
        for step, scalars in log.points:
            logger.log_metrics(scalars, step=step)
    # Files before pictures: should one of these fail, the report is there.
    _upload(log.files, logger, log.name, log.step)
    for kind, (write, _) in RUNS.items():
        if isinstance(logger, kind):
            write(log, logger)
    # Now, as the process may end before loggers are finalised.
    logger.save()


def _upload(files: Mapping[str, Path], logger: Logger, name: str, step: int) -> None:
    for kind, (_, upload) in RUNS.items():
        if files and isinstance(logger, kind):
            upload(files, logger, name, step)
