"""Reports in all loggers of a trainer. A logger that fails causes a warning and never stops a
repair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_nrl._trainer.lightning.packages import (
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
    rank_zero_only,
    rank_zero_warn,
)
from lightning_nrl._trainer.tracking.repair_log import RepairLog, next_free, written
from lightning_nrl._trainer.tracking.scalars import (
    Scalars,
    final_numbers,
    search_curves,
    strength_curves,
)
from lightning_nrl.errors import LoggingWarning
from lightning_nrl.report import RepairReport
from lightning_nrl.report.figures import image_of
from lightning_nrl.report.page import FactList, Heading, Page
from lightning_nrl.report.tables import FLIPPED_COLUMNS
from lightning_nrl.updates import ReleaseReport

Plain = bool | int | float | str

ASKED: Mapping[str, Plain] = {
    **{
        f"repair/{name}": ""
        for name in ("gate", "layer", "method", "target", "with fitness", "with task")
    },
    **{
        f"repair/{name}": 0.0
        for name in ("seed", "with max_time", "with n_passed", "with n_weights")
    },
}
"""HParams columns for the settings of a repair, with a value of the right type. The tab shows the
first five names.
"""
MEASURED = tuple(
    f"repair/{name}"
    for name in (
        *(
            "accepted",
            "known_repaired_in_target",
            "known_broken",
            "unseen_repaired",
            "unseen_broken",
        ),
        *("known_repair_rate", "known_accuracy", "unseen_repair_rate", "unseen_nfr"),
        *("evidence", "unseen_accuracy", "known_regressions", "unseen_regressions"),
    )
)
"""HParams columns for the results of a repair. The tab shows the first five."""
LIGHTNINGS_METRIC = "hp_metric"
LONGEST_TEXT = 60  # characters
MOST_ROWS = 10_000  # W&B shows no more of a table

SweepRow = tuple[Mapping[str, Any], Mapping[str, float]]
"""Settings and results of a row of the HParams tab."""


@rank_zero_only
def track(log: RepairLog, loggers: Sequence[Logger]) -> None:
    """Writes a repair to every logger, on rank zero, at the steps of `RepairLog.points`."""
    to_each(loggers, partial(_write, log), "repair")


@rank_zero_only
def declare(loggers: Sequence[Logger], trained: Mapping[str, Any]) -> None:
    """Declares the HParams columns of a repair to TensorBoard, before training logs its
    hyperparameters `trained`.
    """

    def write(logger: Logger) -> None:
        if writer := writer_of(logger):
            writer._get_file_writer().add_summary(_experiment(trained))

    to_each(loggers, write, "row of hyperparameters")


@rank_zero_only
def track_release(
    report: ReleaseReport, loggers: Sequence[Logger], *, step: int, name: str = "release"
) -> None:
    """Writes the report of a release decision to TensorBoard, and uploads the report's files to W&B
    and MLflow.
    """

    def write(logger: Logger) -> None:
        if writer := writer_of(logger):
            writer.add_text(f"{name}/report", report.to_markdown(), step)
        if run := _run_of(logger):
            run.upload(written(report.files), name, step)
        logger.save()

    to_each(loggers, write, "release report")


@rank_zero_only
def track_numbers(numbers: Scalars, loggers: Sequence[Logger], *, step: int, what: str) -> None:
    """Writes numbers by tag to every logger, on rank zero; `what` names the numbers in a warning."""

    def write(logger: Logger) -> None:
        logger.log_metrics(numbers, step=step)
        logger.save()

    to_each(loggers, write, what)


@rank_zero_only
def track_figures(
    figures: Mapping[str, Any], loggers: Sequence[Logger], *, step: int, name: str, what: str
) -> None:
    """Writes Matplotlib figures by title to TensorBoard, on rank zero; `what` names the figures in
    a warning.
    """

    def write(logger: Logger) -> None:
        if writer := writer_of(logger):
            for title, figure in figures.items():
                writer.add_image(
                    f"{name}_figures/{title}", image_of(figure), step, dataformats="HWC"
                )
            logger.save()

    to_each(loggers, write, what)


@rank_zero_only
def track_sweep(
    rows: Mapping[str, SweepRow], loggers: Sequence[Logger], *, name: str = "sweep"
) -> None:
    """Writes rows of a sweep to every TensorBoard logger, for its HParams tab. Each row is a
    sub-run `<name>/<row>`.
    """

    def write(logger: Logger) -> None:
        if writer := writer_of(logger):
            for label, (asked, found) in rows.items():
                writer.add_hparams(dict(asked), dict(found), run_name=f"{name}/{safe_name(label)}")
            writer.flush()

    to_each(loggers, write, "sweep")


def to_each(loggers: Sequence[Logger], write: Callable[[Logger], None], what: str) -> None:
    """Calls `write` for every logger; warns of each logger for which `write` raises."""
    for logger in loggers:
        try:
            write(logger)
        except Exception as error:
            problem = f"The {what} was not logged to {type(logger).__name__}, which raised {type(error).__name__}: {error}."
            rank_zero_warn(
                f"{problem} The {what} itself and its files are not affected.",
                category=LoggingWarning,
            )


def _write(log: RepairLog, logger: Logger) -> None:
    if writer := writer_of(logger):
        _write_tensorboard(log, writer)
    else:
        for step, scalars in log.points:
            logger.log_metrics(scalars, step=step)
    if run := _run_of(logger):
        # Files first, since a picture may fail.
        run.upload(log.files, log.name, log.step)
        run.write(log)
    # The process may end before loggers are finalised.
    logger.save()


def writer_of(logger: Logger) -> SummaryWriter | None:
    writer = logger.experiment if isinstance(logger, TensorBoardLogger) else None
    return writer if isinstance(writer, SummaryWriter) else None


def _run_of(logger: Logger) -> WandbRun | MlflowRun | None:
    if isinstance(logger, WandbLogger):
        return WandbRun(logger)
    return MlflowRun(logger) if isinstance(logger, MLFlowLogger) else None


def safe_name(title: str) -> str:
    """Replaces each character that Windows forbids in file names by an underscore."""
    return re.sub(r'[<>:"/\\|?*]', "_", title)


def _write_row(
    writer: SummaryWriter, report: RepairReport, trained: Mapping[str, Any] | None
) -> None:
    values = {**_flat(trained or {}), **_asked(report)}
    _, start, end = hparams(values, {})
    for summary in (_experiment(trained or {}), start, end):
        writer._get_file_writer().add_summary(summary)


def _asked(report: RepairReport) -> dict[str, Plain]:
    settings = report.settings
    layer = settings.get("layer", list(report.layers))
    found: dict[str, Any] = {
        "repair/gate": report.gate,
        "repair/layer": layer if isinstance(layer, str) else ", ".join(layer),
        "repair/method": _kind(settings.get("method"), "class"),
        "repair/seed": report.seed,
        "repair/target": report.target,
        "repair/with fitness": _kind(settings.get("fitness"), "kind"),
        "repair/with max_time": settings.get("max_time"),
        "repair/with n_passed": settings.get("n_passed"),
        "repair/with n_weights": None
        if report.localization is None
        else report.localization.sizes.get("localized"),
        "repair/with task": report.task,
    }
    return {
        key: value
        for key, value in _flat(found).items()
        if isinstance(value, str) == isinstance(ASKED[key], str)
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Plain]:
    # Nested keys are joined by slashes, as Lightning joins them.
    found: dict[str, Plain] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
            found[f"{prefix}{key}"] = value
        elif value is not None:
            text = str(value)
            found[f"{prefix}{key}"] = (
                text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."
            )
    return found


def _experiment(trained: Mapping[str, Any]) -> Any:
    metrics = (*MEASURED, *((LIGHTNINGS_METRIC,) if trained else ()))
    experiment, _, _ = hparams({**_flat(trained), **ASKED}, dict.fromkeys(metrics, 0.0))
    return experiment


def _kind(settings: Any, key: str) -> Any:
    return settings.get(key) if isinstance(settings, Mapping) else settings


def _write_tensorboard(log: RepairLog, writer: SummaryWriter) -> None:
    # A repair is a sub-run, since the HParams tab needs a run for each row. All sub-runs have the
    # same tags, so that two repairs share one card. Curves are figures, since TensorBoard's
    # smoothing of scalars would distort them.
    report, step = log.report, log.step
    with SummaryWriter(
        str(next_free(Path(writer.log_dir, log.name), "events.out.tfevents.*"))
    ) as run:
        for tag, value in final_numbers(report).items():
            run.add_scalar(tag, value, step)
        run.add_text("repair/report", report.to_markdown(), step)
        for title, views in log.texts.items():
            page = Page(
                (Heading(title), FactList(tuple((view.caption, view.text) for view in views)))
            )
            run.add_text(f"repair_samples/{title}", page.markdown(), step)
        changes = [
            change.detach().float().flatten().cpu() for change in (log.changes or {}).values()
        ]
        flat = torch.cat(changes) if changes else torch.zeros(0)
        if bool((flat != 0).any()):
            run.add_histogram("repair_weights/change", flat[flat != 0], step)
        _write_row(run, report, log.hparams)
        _write_pictures(log, run)  # last, since a figure may fail


def _write_pictures(log: RepairLog, run: SummaryWriter) -> None:
    if log.drawn:
        # The capital letter sorts the tag first.
        run.add_image("repair/Summary", image_of(log.summary), log.step, dataformats="HWC")
        for group, figures in (("repair_figures", log.figures), ("repair_samples", log.galleries)):
            for title, figure in figures.items():
                run.add_image(f"{group}/{title}", image_of(figure), log.step, dataformats="HWC")
    else:
        for at, scalars in (
            *enumerate(search_curves(log.report)),
            *strength_curves(log.report).items(),
        ):
            for tag, value in scalars.items():
                run.add_scalar(tag, value, at)
        for title, views in log.pictures.items():
            for view in views:
                run.add_image(
                    f"repair_samples/{title}, {view.caption}",
                    view.pixels,
                    log.step,
                    dataformats="HWC",
                )


@dataclass(frozen=True)
class WandbRun:
    logger: WandbLogger

    def write(self, log: RepairLog) -> None:
        logger, name, step = self.logger, log.name, log.step
        if log.drawn:
            logger.log_image(f"{name}/summary", [image_of(log.summary)], step=step)
        for title, figure in log.figures.items():
            logger.log_image(f"{name}_figures/{safe_name(title)}", [image_of(figure)], step=step)
        for title, views in log.pictures.items():
            pixels, captions = [view.pixels for view in views], [view.caption for view in views]
            logger.log_image(
                f"{name}_samples/{safe_name(title)}", pixels, step=step, caption=captions
            )
        for title, views in log.texts.items():
            texts = [[view.caption, view.text] for view in views]
            logger.log_text(
                f"{name}_samples/{safe_name(title)}", ["sample", "text"], texts, step=step
            )
        if log.flipped:
            columns, rows = _flipped_with_pictures(log)
            logger.log_table(f"{name}/flipped_samples", columns, rows, step=step)

    def upload(self, files: Mapping[str, Path], name: str, step: int) -> None:
        """Uploads the HTML page of the report as a panel, and all files as one artifact of the run."""
        import wandb

        if not files:
            return
        run = self.logger.experiment
        if "html" in files:
            with files["html"].open(encoding="utf-8") as opened:
                page: Any = wandb.Html(opened, inject=False)
            self.logger.log_metrics({f"{name}/report": page}, step)
        artifact = wandb.Artifact(f"{name}-{run.id}", type="report")
        for path in files.values():
            artifact.add_file(str(path))
        run.log_artifact(artifact)


def _flipped_with_pictures(log: RepairLog) -> tuple[list[str], list[list[Any]]]:
    import wandb

    shown = {(view.split, view.id): view.pixels for view in log.views if view.pixels is not None}
    rows = sorted(log.flipped, key=lambda row: (row[0], row[1]) not in shown)[:MOST_ROWS]
    if not shown:
        return list(FLIPPED_COLUMNS), rows
    pictures = [shown.get((row[0], row[1])) for row in rows]
    images = [None if pixels is None else wandb.Image(pixels) for pixels in pictures]
    return [*FLIPPED_COLUMNS, "input"], [
        [*row, image] for row, image in zip(rows, images, strict=True)
    ]


@dataclass(frozen=True)
class MlflowRun:
    logger: MLFlowLogger

    def write(self, log: RepairLog) -> None:
        client, run_id, name = self.logger.experiment, self.logger.run_id, log.name
        figures = {"summary": log.summary, **log.figures} if log.drawn else {}
        for folder, drawn in (("figures", figures), ("samples", log.galleries)):
            for title, figure in drawn.items():
                client.log_figure(run_id, figure, f"{name}/{folder}/{safe_name(title)}.png")
        for title, views in log.texts.items():
            text = "\n\n".join(f"{view.caption}\n{view.text}" for view in views)
            client.log_text(run_id, text, f"{name}/samples/{safe_name(title)}.txt")
        if log.flipped and find_spec("pandas") is not None:  # MLflow needs pandas for tables
            columns = {
                column: [row[i] for row in log.flipped] for i, column in enumerate(FLIPPED_COLUMNS)
            }
            client.log_table(run_id, columns, f"{name}/flipped_samples.json")

    def upload(self, files: Mapping[str, Path], name: str, step: int) -> None:
        for path in files.values():
            self.logger.experiment.log_artifact(self.logger.run_id, str(path), name)
