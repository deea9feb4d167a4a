"""One report to all loggers of a trainer. Logging comes last and must never cost the repair, or the decision."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from time import time
from typing import Any, Literal

from torch.utils.tensorboard import SummaryWriter

from lightning_nrl._trainer.lightning.packages import (
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
    rank_zero_only,
    rank_zero_warn,
)
from lightning_nrl._trainer.tracking.learning_curves import history_figures
from lightning_nrl._trainer.tracking.repair_log import RepairLog, written
from lightning_nrl._trainer.tracking.scalars import Scalars
from lightning_nrl._trainer.tracking.tensorboard import declare_columns, write_tensorboard
from lightning_nrl.analysis.sweep import Run, SweepResult
from lightning_nrl.errors import LoggingWarning, check_choice
from lightning_nrl.localization import TrainingRecord
from lightning_nrl.report._figures import image_of
from lightning_nrl.report.splits import ROLES
from lightning_nrl.report.tables import FLIPPED_COLUMNS
from lightning_nrl.updates import ReleaseReport

MOST_ROWS = 10_000
"""W&B shows no more of a table."""


def write_wandb(log: RepairLog, logger: WandbLogger) -> None:
    """Writes what is no number through the logger's own `log_image`, `log_table` and `log_text`."""
    name, step = log.name, log.step
    if log.drawn:
        logger.log_image(f"{name}/summary", [image_of(log.summary)], step=step)
    for title, figure in log.figures.items():
        logger.log_image(f"{name}_figures/{_key(title)}", [image_of(figure)], step=step)
    for title, views in log.pictures.items():
        captions = [view.caption for view in views]
        logger.log_image(f"{name}_samples/{_key(title)}", [view.pixels for view in views], step=step, caption=captions)
    for title, views in log.texts.items():
        texts = [[view.caption, view.text] for view in views]
        logger.log_text(f"{name}_samples/{_key(title)}", ["sample", "text"], texts, step=step)
    if log.flipped:
        columns, rows = _flipped(log)
        logger.log_table(f"{name}/flipped_samples", columns, rows, step=step)


def _flipped(log: RepairLog) -> tuple[list[str], list[list[Any]]]:
    """The table of flipped samples, those first that have a picture, where any has one."""
    import wandb

    shown = {(view.split, view.id): view.pixels for view in log.views if view.pixels is not None}
    rows = sorted(log.flipped, key=lambda row: (row[0], row[1]) not in shown)[:MOST_ROWS]
    if not shown:
        return list(FLIPPED_COLUMNS), rows
    pictures = [shown.get((row[0], row[1])) for row in rows]
    images = [None if pixels is None else wandb.Image(pixels) for pixels in pictures]
    return [*FLIPPED_COLUMNS, "input"], [[*row, image] for row, image in zip(rows, images, strict=True)]


def _key(title: str) -> str:
    """A title without what Windows allows in no name of a file, which W&B makes of it."""
    return re.sub(r'[<>:"/\\|?*]', "_", title)


def upload_to_wandb(files: Mapping[str, Path], logger: WandbLogger, name: str, step: int) -> None:
    """The page as a panel, and all files as one artifact of the run."""
    import wandb

    run = logger.experiment
    if "html" in files:
        with files["html"].open(encoding="utf-8") as opened:
            page: Any = wandb.Html(opened, inject=False)
        logger.log_metrics({f"{name}/report": page}, step)
    artifact = wandb.Artifact(f"{name}-{run.id}", type="report")
    for path in files.values():
        artifact.add_file(str(path))
    run.log_artifact(artifact)


BATCH = 1_000
"""MLflow takes no more numbers in one request."""


def write_mlflow(log: RepairLog, logger: MLFlowLogger) -> None:
    """Numbers as metrics, all else into a folder of the run's artifacts that is called as the repair is."""
    client, run_id, name = logger.experiment, logger.run_id, log.name
    _write_numbers(log, logger)
    figures = {"summary": log.summary} if log.drawn else {}
    for title, figure in {**figures, **log.figures}.items():
        client.log_figure(run_id, figure, f"{name}/figures/{_file(title)}.png")
    for title, figure in log.galleries.items():
        client.log_figure(run_id, figure, f"{name}/samples/{_file(title)}.png")
    for title, views in log.texts.items():
        text = "\n\n".join(f"{view.caption}\n{view.text}" for view in views)
        client.log_text(run_id, text, f"{name}/samples/{_file(title)}.txt")
    if log.flipped and find_spec("pandas") is not None:  # with which MLflow writes tables
        columns: dict[str, Any] = {
            column: list(values) for column, values in zip(FLIPPED_COLUMNS, zip(*log.flipped, strict=True), strict=True)
        }
        client.log_table(run_id, columns, f"{name}/flipped_samples.json")


def upload_to_mlflow(files: Mapping[str, Path], logger: MLFlowLogger, name: str, step: int) -> None:
    """All files, into a folder of the run's artifacts."""
    for path in files.values():
        logger.experiment.log_artifact(logger.run_id, str(path), name)


def _write_numbers(log: RepairLog, logger: MLFlowLogger) -> None:
    """As the logger's `log_metrics` does, but for many steps in one request: a search has hundreds."""
    from mlflow.entities import Metric

    now = int(time() * 1000)
    metrics = [
        Metric(re.sub(r"[^A-Za-z0-9_/. -]+", "", tag), value, now, step)
        for step, scalars in log.points
        for tag, value in scalars.items()
    ]
    for start in range(0, len(metrics), BATCH):
        logger.experiment.log_batch(logger.run_id, metrics=metrics[start : start + BATCH])


def _file(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", title).strip("_")


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


SWEPT_COLUMNS = ("fitness", "alpha", "perfect_intact", "n_weights", "n_passed", "particles")
MEASURED_COUNTS = ("repaired_in_target", "broken_in_target", "repaired", "broken", "accuracy_after")

Row = tuple[dict[str, bool | int | float | str], dict[str, float]]
"""What was asked for, and what came of it."""


@rank_zero_only
def track_sweep(
    result: SweepResult,
    loggers: Sequence[Logger],
    *,
    each: Literal["setting", "run"] = "setting",
    name: str = "sweep",
) -> None:
    """Writes a sweep to the HParams tab of every TensorBoard logger, on rank zero; other loggers have no such thing.

    A row is a `setting`, by the means of its runs, or every `run`. `name` is the first part of every tag and sub-run.
    """
    rows = sweep_rows(result, each, name)

    def write(logger: Logger) -> None:
        if writer := writer_of(logger):
            for label, (asked, found) in rows.items():
                writer.add_hparams(asked, found, run_name=f"{name}/{re.sub(r'[^A-Za-z0-9_.=-]+', '_', label)}")
            writer.flush()

    to_each(loggers, write, "sweep")


def sweep_rows(
    result: SweepResult, each: Literal["setting", "run"] = "setting", name: str = "sweep"
) -> Mapping[str, Row]:
    """Rows of the tab by the names of their sub-runs, all with the same columns: the tab knows only the first's."""
    check_choice("each", each, ("setting", "run"))
    if each == "run":
        return {f"{run.setting} seed={run.seed}": _row((run,), name, seed=run.seed) for run in result.runs}
    return {setting: _row(result.of(setting), name) for setting in dict.fromkeys(run.setting for run in result.runs)}


def _row(runs: Sequence[Run], name: str, **further: int) -> Row:
    first = runs[0]
    asked = {"setting": first.setting, **{column: _word(getattr(first, column)) for column in SWEPT_COLUMNS}, **further}
    found = {f"{name}/regression_free": mean(run.regression_free for run in runs)}
    for role in ROLES:
        if first.has(role):
            counts = [run.counts(role) for run in runs]
            found |= {
                f"{name}/{role}_{measure}": mean(getattr(one, measure) for one in counts) for measure in MEASURED_COUNTS
            }
    found[f"{name}/seconds"] = mean(run.seconds for run in runs)
    return asked, {tag: float(value) for tag, value in found.items() if math.isfinite(value)}


def _word(value: bool | int | float | str | None) -> bool | int | float | str:
    return "auto" if value is None else value
