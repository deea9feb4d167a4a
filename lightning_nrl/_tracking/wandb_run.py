"""A repair in Weights & Biases: numbers, figures, a table of flipped samples with their pictures, and an artifact."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_nrl._lightning.packages import WandbLogger
from lightning_nrl._tracking.repair_log import RepairLog
from lightning_nrl.report._figures import image_of
from lightning_nrl.report.tables import FLIPPED_COLUMNS

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
