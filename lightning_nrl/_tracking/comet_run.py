"""A repair in Comet: figures, pictures, a table and the report as assets of the experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_nrl._lightning import CometLogger
from lightning_nrl._tracking.repair_log import RepairLog
from lightning_nrl.report.sample_tables import FLIPPED_COLUMNS


def write_comet(log: RepairLog, logger: CometLogger) -> None:
    """Writes what is no number to the experiment."""
    experiment, name, step = logger.experiment, log.name, log.step
    figures = {f"{name}/summary": log.summary} if log.drawn else {}
    for title, figure in {**figures, **{f"{name}_figures/{title}": one for title, one in log.figures.items()}}.items():
        experiment.log_figure(figure_name=title, figure=figure, step=step)
    for title, views in log.pictures.items():
        for view in views:
            experiment.log_image(view.pixels, name=f"{name}_samples/{title}/{view.caption}", step=step)
    for title, views in log.texts.items():
        for view in views:
            experiment.log_text(f"{title}, {view.caption}\n{view.text}", step=step)
    if log.flipped:
        rows = [["" if cell is None else cell for cell in row] for row in log.flipped]
        experiment.log_table(f"{name}_flipped_samples.csv", rows, headers=list(FLIPPED_COLUMNS))


def upload_to_comet(files: Mapping[str, Path], logger: CometLogger, name: str, step: int) -> None:
    """The page as HTML, and all files as assets."""
    if "html" in files:
        logger.experiment.log_html(files["html"].read_text(encoding="utf-8"))
    for path in files.values():
        logger.experiment.log_asset(str(path), file_name=f"{name}/{path.name}", step=step)
