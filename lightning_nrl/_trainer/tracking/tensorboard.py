"""What TensorBoard shows of a repair: numbers, figures, pictures of samples, text, a histogram, its hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_nrl._trainer.tracking.repair_log import RepairLog, next_free
from lightning_nrl._trainer.tracking.scalars import final_numbers, search_curves, strength_curves
from lightning_nrl.report import RepairReport
from lightning_nrl.report._figures import image_of
from lightning_nrl.report.page import Facts, Heading, Page

Plain = bool | int | float | str

ASKED: Mapping[str, Plain] = {
    **{f"repair/{name}": "" for name in ("gate", "layer", "method", "target", "with fitness", "with task")},
    **{f"repair/{name}": 0.0 for name in ("seed", "with max_time", "with n_passed", "with n_weights")},
}
"""Columns of what a repair was asked for, each with a value of its type; the tab shows five, sorted by name."""
MEASURED = tuple(
    f"repair/{name}"
    for name in (
        *("accepted", "known_repaired_in_target", "known_broken", "unseen_repaired", "unseen_broken"),
        *("known_repair_rate", "known_accuracy", "unseen_repair_rate", "unseen_break_rate", "unseen_nfr"),
        *("unseen_accuracy", "known_regressions", "unseen_regressions"),
    )
)
"""Columns of what came of it; the tab shows the first five."""
LIGHTNINGS_METRIC = "hp_metric"
LONGEST_TEXT = 60  # characters


def declare_columns(writer: SummaryWriter, trained: Mapping[str, Any]) -> None:
    """Writes the columns of training's hyperparameters and of a repair, to the run that training is about to use."""
    writer._get_file_writer().add_summary(_experiment(trained))


def write_row(writer: SummaryWriter, report: RepairReport, trained: Mapping[str, Any] | None) -> None:
    """Writes the row of a repair to the run in which its scalars are; with training's hyperparameters, if any."""
    values = {**flat(trained or {}), **asked(report)}
    _, start, end = hparams(values, {})
    for summary in (_experiment(trained or {}), start, end):
        writer._get_file_writer().add_summary(summary)


def asked(report: RepairReport) -> dict[str, Plain]:
    """What a repair was asked for, as far as it is known."""
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
        "repair/with n_weights": None if report.localization is None else report.localization.sizes.get("localized"),
        "repair/with task": report.task,
    }
    return {key: value for key, value in flat(found).items() if isinstance(value, str) == isinstance(ASKED[key], str)}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Plain]:
    """Nested settings as one level, named as Lightning names them; what is None is left out, the rest is text."""
    found: dict[str, Plain] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
            found[f"{prefix}{key}"] = value
        elif value is not None:
            text = str(value)
            found[f"{prefix}{key}"] = text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."
    return found


def _experiment(trained: Mapping[str, Any]) -> Any:
    metrics = (*MEASURED, *((LIGHTNINGS_METRIC,) if trained else ()))
    experiment, _, _ = hparams({**flat(trained), **ASKED}, dict.fromkeys(metrics, 0.0))
    return experiment


def _kind(settings: Any, key: str) -> Any:
    return settings.get(key) if isinstance(settings, Mapping) else settings


def write_tensorboard(log: RepairLog, writer: SummaryWriter) -> None:
    """Writes a repair to a sub-run of the training's run, since the HParams tab needs a run for a row.

    Tags are the same in each, so that two repairs stand in one card. Curves are figures: smoothing would bend scalars.
    """
    report, step = log.report, log.step
    with SummaryWriter(str(next_free(Path(writer.log_dir, log.name), "events.out.tfevents.*"))) as run:
        for tag, value in final_numbers(report).items():
            run.add_scalar(tag, value, step)
        run.add_text("repair/report", report.to_markdown(), step)
        for title, views in log.texts.items():
            page = Page((Heading(title), Facts(tuple((view.caption, view.text) for view in views))))
            run.add_text(f"repair_samples/{title}", page.markdown(), step)
        changes = [change.detach().float().flatten().cpu() for change in (log.changes or {}).values()]
        flat = torch.cat(changes) if changes else torch.zeros(0)
        if bool((flat != 0).any()):
            run.add_histogram("repair_weights/change", flat[flat != 0], step)
        write_row(run, report, log.hparams)
        _write_pictures(log, run)


def _write_pictures(log: RepairLog, run: SummaryWriter) -> None:
    """Last, since a figure that cannot be drawn should cost no numbers."""
    if log.drawn:
        # A capital sorts before all numbers.
        run.add_image("repair/Summary", image_of(log.summary), log.step, dataformats="HWC")
        for group, figures in (("repair_figures", log.figures), ("repair_samples", log.galleries)):
            for title, figure in figures.items():
                run.add_image(f"{group}/{title}", image_of(figure), log.step, dataformats="HWC")
    else:
        for at, scalars in (*enumerate(search_curves(log.report)), *strength_curves(log.report).items()):
            for tag, value in scalars.items():
                run.add_scalar(tag, value, at)
        for title, views in log.pictures.items():
            for view in views:
                run.add_image(f"repair_samples/{title}, {view.caption}", view.pixels, log.step, dataformats="HWC")
