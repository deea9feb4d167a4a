"""Reports in all loggers of a trainer. A logger that fails causes a warning, never an error."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from lightning_nrl._trainer.tracking.repair_log import Figure, RepairLog, next_free, written
from lightning_nrl._trainer.tracking.scalars import (
    Scalars,
    final_numbers,
    search_curves,
    strength_curves,
)
from lightning_nrl._trainer.tracking.tags import (
    ASKED,
    FIGURE_TAG,
    FLIPPED_TAG,
    LIGHTNINGS_METRIC,
    MEASURED,
    REPORT_TAG,
    SAMPLES_TAG,
    SUMMARY_TAG,
    WANDB_SUMMARY_TAG,
    WEIGHTS_TAG,
    Plain,
    tag,
)
from lightning_nrl.errors import LoggingWarning
from lightning_nrl.release import ReleaseReport
from lightning_nrl.report import RepairReport
from lightning_nrl.report.figures import image_of
from lightning_nrl.report.page import FactList, Heading, Page
from lightning_nrl.report.tables import FLIPPED_COLUMNS, flipped_rows

LONGEST_TEXT = 60  # characters; more would widen the table of the HParams tab
MOST_ROWS = 10_000  # W&B shows no more of a table

SweepRow = tuple[Mapping[str, Any], Mapping[str, float]]
"""Settings and results of a row of the HParams tab."""


@rank_zero_only
def track(log: RepairLog, loggers: Sequence[Logger]) -> None:
    """Writes a repair to every logger, on rank zero, at the steps of `RepairLog.points`."""
    for logger in loggers:
        with failure_as_warning(logger, "repair"):
            if writer := writer_of(logger):
                _write_tensorboard(log, writer)
            else:
                for step, scalars in log.points:
                    logger.log_metrics(scalars, step=step)
            if run := _run_of(logger):
                # Files first, since a picture may fail.
                run.upload(written(log.report.files), log.name, log.step)
                run.write(log)
            # The process may end before loggers are finalised.
            logger.save()


@rank_zero_only
def declare(loggers: Sequence[Logger], trained: Mapping[str, Any]) -> None:
    """Declares the HParams columns of a repair to TensorBoard.

    It must run before training logs its hyperparameters `trained`.
    """
    for logger in loggers:
        with failure_as_warning(logger, "row of hyperparameters"):
            if writer := writer_of(logger):
                writer._get_file_writer().add_summary(_experiment(trained))


@rank_zero_only
def track_release(
    report: ReleaseReport, loggers: Sequence[Logger], *, step: int, name: str = "release"
) -> None:
    """Writes a release report to TensorBoard, and uploads its files to W&B and MLflow."""
    for logger in loggers:
        with failure_as_warning(logger, "release report"):
            if writer := writer_of(logger):
                writer.add_text(tag(REPORT_TAG, name), report.to_markdown(), step)
            if run := _run_of(logger):
                run.upload(written(report.files), name, step)
            logger.save()


@rank_zero_only
def track_numbers(numbers: Scalars, loggers: Sequence[Logger], *, step: int, what: str) -> None:
    """Writes numbers by tag to every logger, on rank zero; `what` names them in a warning."""
    for logger in loggers:
        with failure_as_warning(logger, what):
            logger.log_metrics(numbers, step=step)
            logger.save()


@rank_zero_only
def track_figures(
    figures: Mapping[str, Figure], loggers: Sequence[Logger], *, step: int, name: str, what: str
) -> None:
    """Writes figures by title to TensorBoard, on rank zero; `what` names them in a warning."""
    for logger in loggers:
        with failure_as_warning(logger, what):
            if writer := writer_of(logger):
                _add_figures(writer, figures, FIGURE_TAG, name, step)
                logger.save()


@rank_zero_only
def track_sweep(rows: Mapping[str, SweepRow], loggers: Sequence[Logger]) -> None:
    """Writes rows of a sweep to every TensorBoard logger, for its HParams tab.

    Each row is a sub-run `sweep/<row>`.
    """
    for logger in loggers:
        with failure_as_warning(logger, "sweep"):
            if writer := writer_of(logger):
                for label, (settings, results) in rows.items():
                    run_name = f"sweep/{safe_name(label)}"
                    writer.add_hparams(dict(settings), dict(results), run_name=run_name)
                writer.flush()


@contextmanager
def failure_as_warning(logger: Logger, what: str) -> Iterator[None]:
    """Turns an exception into a warning that `what` was not logged to a logger."""
    try:
        yield
    except Exception as error:
        raised = f"{type(logger).__name__}, which raised {type(error).__name__}: {error}."
        rank_zero_warn(
            f"The {what} was not logged to {raised} "
            f"The {what} itself and its files are not affected.",
            category=LoggingWarning,
        )


def writer_of(logger: Logger) -> SummaryWriter | None:
    writer = logger.experiment if isinstance(logger, TensorBoardLogger) else None
    return writer if isinstance(writer, SummaryWriter) else None


def safe_name(title: str) -> str:
    """Replaces each character that Windows forbids in file names by an underscore."""
    return re.sub(r'[<>:"/\\|?*]', "_", title)


def _asked(report: RepairReport) -> dict[str, Plain]:
    settings = report.settings
    layer = settings.get("layer", list(report.layers))
    if not isinstance(layer, str):
        layer = ", ".join(layer)
    values = {
        "gate": report.gate,
        "layer": layer,
        "method": _kind(settings.get("method"), "class"),
        "seed": report.seed,
        "target": report.target,
        "with fitness": _kind(settings.get("fitness"), "kind"),
        "with max_time": settings.get("max_time"),
        "with n_passed": settings.get("n_passed"),
        "with task": report.task,
    }
    if report.localization is not None:
        values["with n_weights"] = report.localization.sizes.get("localized")
    # A column takes either texts or numbers.
    return {
        column: value
        for column, value in _flat({"repair": values}).items()
        if isinstance(value, str) == isinstance(ASKED[column], str)
    }


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, Plain]:
    # Nested keys are joined by slashes, as Lightning joins them.
    flat: dict[str, Plain] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        elif value is not None:
            flat[f"{prefix}{name}"] = _plain(value)
    return flat


def _plain(value: object) -> Plain:
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = str(value)
    if len(text) > LONGEST_TEXT:
        return f"{text[: LONGEST_TEXT - 3]}..."
    return text


def _experiment(trained: Mapping[str, Any]) -> object:
    results = dict.fromkeys(MEASURED, 0.0)
    if trained:
        results[LIGHTNINGS_METRIC] = 0.0
    experiment, _, _ = hparams({**_flat(trained), **ASKED}, results)
    return experiment


def _kind(settings: object, key: str) -> object:
    return settings.get(key) if isinstance(settings, Mapping) else settings


def _write_tensorboard(log: RepairLog, writer: SummaryWriter) -> None:
    # A repair is a sub-run, since the HParams tab needs a run for each row. All sub-runs have the
    # same tags, so that two repairs share one card. Curves are figures, since TensorBoard's
    # smoothing of scalars would distort them.
    name, step = "repair", log.step
    folder = next_free(Path(writer.log_dir, log.name), "events.out.tfevents.*")
    with SummaryWriter(str(folder)) as run:
        _add_scalars(run, final_numbers(log.report), step)
        run.add_text(tag(REPORT_TAG, name), log.report.to_markdown(), step)
        for title, views in log.texts.items():
            facts = FactList(tuple((view.caption, view.text) for view in views))
            text = Page((Heading(title), facts)).markdown()
            run.add_text(tag(SAMPLES_TAG, name, title), text, step)
        changes = [change.detach().float().flatten().cpu() for change in log.changes.values()]
        change = torch.cat([torch.zeros(0), *changes])
        if change.any():
            run.add_histogram(tag(WEIGHTS_TAG, name), change[change != 0], step)
        _, start, end = hparams(_flat(log.hparams) | _asked(log.report), {})
        for summary in (_experiment(log.hparams), start, end):
            run._get_file_writer().add_summary(summary)
        if log.drawn:  # last, since a figure may fail
            _add_figures(run, {"": log.summary}, SUMMARY_TAG, name, step)
            _add_figures(run, log.figures, FIGURE_TAG, name, step)
            _add_figures(run, log.galleries, SAMPLES_TAG, name, step)
        else:
            _write_undrawn(log, run, name)


def _add_scalars(run: SummaryWriter, scalars: Scalars, step: int) -> None:
    for number, value in scalars.items():
        run.add_scalar(number, value, step)


def _add_figures(
    run: SummaryWriter, figures: Mapping[str, Figure], template: str, name: str, step: int
) -> None:
    for title, figure in figures.items():
        run.add_image(tag(template, name, title), image_of(figure), step, dataformats="HWC")


def _write_undrawn(log: RepairLog, run: SummaryWriter, name: str) -> None:
    """Writes curves as scalars, and each picture of a sample as an image."""
    curves = (*enumerate(search_curves(log.report)), *strength_curves(log.report).items())
    for at, scalars in curves:
        _add_scalars(run, scalars, at)
    for title, views in log.pictures.items():
        for view in views:
            key = tag(SAMPLES_TAG, name, f"{title}, {view.caption}")
            run.add_image(key, view.pixels, log.step, dataformats="HWC")


@dataclass(frozen=True)
class WandbRun:
    logger: WandbLogger

    def write(self, log: RepairLog) -> None:
        logger, name, step = self.logger, log.name, log.step
        if log.drawn:
            logger.log_image(tag(WANDB_SUMMARY_TAG, name), [image_of(log.summary)], step=step)
        for title, figure in log.figures.items():
            key = tag(FIGURE_TAG, name, safe_name(title))
            logger.log_image(key, [image_of(figure)], step=step)
        for title, views in log.pictures.items():
            pixels = [view.pixels for view in views]
            captions = [view.caption for view in views]
            key = tag(SAMPLES_TAG, name, safe_name(title))
            logger.log_image(key, pixels, step=step, caption=captions)
        for title, views in log.texts.items():
            rows = [[view.caption, view.text] for view in views]
            key = tag(SAMPLES_TAG, name, safe_name(title))
            logger.log_text(key, ["sample", "text"], rows, step=step)
        columns, rows = _flipped_with_pictures(log)
        if rows:
            logger.log_table(tag(FLIPPED_TAG, name), columns, rows, step=step)

    def upload(self, files: Mapping[str, Path], name: str, step: int) -> None:
        """Uploads the report's HTML page as a panel, and all files as one artifact of the run."""
        import wandb

        if not files:
            return
        run = self.logger.experiment
        if "html" in files:
            with files["html"].open(encoding="utf-8") as opened:
                page = wandb.Html(opened, inject=False)
            self.logger.log_metrics({tag(REPORT_TAG, name): page}, step)
        artifact = wandb.Artifact(f"{name}-{run.id}", type="report")
        for path in files.values():
            artifact.add_file(str(path))
        run.log_artifact(artifact)


def _flipped_with_pictures(log: RepairLog) -> tuple[list[str], list[list[Any]]]:
    import wandb

    pictured = [view for view in log.views if view.pixels is not None]
    pixels: dict[object, object] = {(view.split, view.id): view.pixels for view in pictured}
    flipped = flipped_rows(log.report)
    if not pixels:
        return list(FLIPPED_COLUMNS), flipped[:MOST_ROWS]
    rows = []
    for row in sorted(flipped, key=lambda row: (row[0], row[1]) not in pixels)[:MOST_ROWS]:
        picture = pixels.get((row[0], row[1]))
        rows.append([*row, None if picture is None else wandb.Image(picture)])
    return [*FLIPPED_COLUMNS, "input"], rows


@dataclass(frozen=True)
class MlflowRun:
    logger: MLFlowLogger

    def write(self, log: RepairLog) -> None:
        client, run_id, name = self.logger.experiment, self.logger.run_id, log.name
        if log.drawn:
            client.log_figure(run_id, log.summary, f"{name}/figures/summary.png")
        for folder, figures in (("figures", log.figures), ("samples", log.galleries)):
            for title, figure in figures.items():
                client.log_figure(run_id, figure, f"{name}/{folder}/{safe_name(title)}.png")
        for title, views in log.texts.items():
            text = "\n\n".join(f"{view.caption}\n{view.text}" for view in views)
            client.log_text(run_id, text, f"{name}/samples/{safe_name(title)}.txt")
        flipped = flipped_rows(log.report)
        if flipped and find_spec("pandas") is not None:  # MLflow needs pandas for tables
            columns = dict(zip(FLIPPED_COLUMNS, map(list, zip(*flipped, strict=True)), strict=True))
            client.log_table(run_id, columns, f"{name}/flipped_samples.json")

    def upload(self, files: Mapping[str, Path], name: str, step: int) -> None:
        for path in files.values():
            self.logger.experiment.log_artifact(self.logger.run_id, str(path), name)


def _run_of(logger: Logger) -> WandbRun | MlflowRun | None:
    if isinstance(logger, WandbLogger):
        return WandbRun(logger)
    return MlflowRun(logger) if isinstance(logger, MLFlowLogger) else None
