"""What TensorBoard shows of a repair beyond scalars: overlaid curves, the report, a histogram, its hyperparameters."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_nrl._tracking.scalars import outcome, search_curves, strength_curves
from lightning_nrl.report import RepairReport, repair_figures
from lightning_nrl.report._figures import image_of
from lightning_nrl.report.repair_plot import gallery_figures
from lightning_nrl.report.sample_views import SampleView

__all__ = ["hparams", "layout", "write_extras"]

FIRST = ("accepted", "known_repaired_in_target", "known_broken", "unseen_repaired", "unseen_broken")
"""The HParams tab shows five metrics of its own accord."""


def write_extras(
    report: RepairReport,
    writer: SummaryWriter,
    *,
    step: int,
    change: Tensor | None,
    name: str = "repair",
    views: Sequence[SampleView] = (),
) -> None:
    """Writes what only TensorBoard shows, for a writer of the run in which the scalars are; arguments as of `track`.

    Layout and hyperparameters go to a sub-run: TensorBoard reads but one of each from a run, and training may have its
    own. Layouts of several runs are shown together; of hyperparameters only the columns of the first run that has any.
    """
    writer.add_text(f"{name}/report", report.to_markdown(), step)
    if find_spec("matplotlib") is not None:
        for title, figure in repair_figures(report).items():
            writer.add_image(f"{name}_figures/{title}", image_of(figure), step, dataformats="HWC")
        for title, figure in gallery_figures(views).items():
            writer.add_image(f"{name}_samples/{title}", image_of(figure), step, dataformats="HWC")
    if change is not None and change.numel():
        writer.add_histogram(f"{name}/weight_change", change.detach().float().cpu(), step)
    charts = layout(report, name)
    if charts:
        with SummaryWriter(os.path.join(writer.log_dir, name)) as sub_run:
            sub_run.add_custom_scalars(charts)
    found = outcome(report, name)
    first = {tag: found[tag] for tag in (f"{name}/{number}" for number in FIRST) if tag in found}
    writer.add_hparams(hparams(report), first | found, run_name=name, global_step=step)


SEARCH_CHARTS = {
    "Best so far: samples repaired and broken": ("repaired", "broken"),
    "Fitness: best so far and mean of the swarm": ("best_fitness", "mean_fitness"),
    "Best so far: loss on failed and on passed": ("loss_failed", "loss_passed"),
    "Diversity of the swarm": ("diversity",),
}
STRENGTH_CHARTS = {
    "Known samples repaired and broken, by strength in percent": ("known_repaired", "known_broken"),
    "Calibration samples repaired and broken, by strength in percent": ("calibration_repaired", "calibration_broken"),
}


def layout(report: RepairReport, name: str = "repair") -> dict[str, dict[str, list[Any]]]:
    """Charts of the Custom Scalars tab: the path of the patch and the course of the search, of tags that are given."""
    strength = (tag for scalars in strength_curves(report, name).values() for tag in scalars)
    search = (tag for scalars in search_curves(report, name) for tag in scalars)
    groups = {
        f"{name}: how far to go": _charts(f"{name}_strength", STRENGTH_CHARTS, strength),
        f"{name}: course of the search": _charts(f"{name}_search", SEARCH_CHARTS, search),
    }
    return {title: charts for title, charts in groups.items() if charts}


def _charts(group: str, charts: Mapping[str, tuple[str, ...]], tags: Iterable[str]) -> dict[str, list[Any]]:
    given = set(tags)
    present = {
        title: [tag for tag in (f"{group}/{curve}" for curve in curves) if tag in given]
        for title, curves in charts.items()
    }
    # Each entry is a regular expression over tags.
    return {title: ["Multiline", [f"^{re.escape(tag)}$" for tag in found]] for title, found in present.items() if found}


def hparams(report: RepairReport) -> dict[str, bool | int | float | str]:
    """What was asked for, flat, for a row of the HParams tab.

    The tab sorts names and shows five of its own accord: the details, `with. ...`, come last.
    """
    asked: dict[str, Any] = {
        "fitness": _kind(report.settings.get("fitness")),
        "gate": report.gate,
        "layer": ", ".join(report.layers),
        "seed": report.seed,
        "target": report.target,
        "task": report.task,
        "weights": None if report.localization is None else report.localization.sizes.get("localized"),
    }
    details = {key: value for key, value in report.settings.items() if key not in asked or isinstance(value, Mapping)}
    return _flat(asked) | _flat(details, "with.")


def _kind(settings: Any) -> Any:
    return settings.get("kind") if isinstance(settings, Mapping) else settings


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    out: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            plain = isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
            out[f"{prefix}{key}"] = value if plain else str(value)
    return out
