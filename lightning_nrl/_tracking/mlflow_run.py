"""A repair in MLflow: its files, figures, pictures and table as artifacts of the run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from time import time
from typing import Any

from lightning_nrl._lightning.packages import MLFlowLogger
from lightning_nrl._tracking.repair_log import RepairLog
from lightning_nrl.report.tables import FLIPPED_COLUMNS

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
