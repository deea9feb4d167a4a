"""What TensorBoard shows of a repair beyond scalars: overlaid curves, the report, a histogram, its hyperparameters."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_nrl.report import RepairReport
from lightning_nrl.tracking.scalars import before_after, search_curves, verdict

__all__ = ["hparams", "layout", "write_extras"]


def write_extras(
    report: RepairReport, writer: SummaryWriter, *, step: int, change: Tensor | None, name: str = "repair"
) -> None:
    """Writes what only TensorBoard shows.

    Layout and hyperparameters go to a sub-run: TensorBoard reads but one of each from a run, and training may have its
    own. Layouts of several runs are shown together.

    Args:
        report: the account of the repair.
        writer: of the run in which the scalars are.
        step: the global step of training.
        change: the change of every searched weight; None if there was no candidate.
        name: the first part of every tag, and the name of the sub-run.
    """
    writer.add_text(f"{name}/report", report.to_markdown(), step)
    if change is not None and change.numel():
        writer.add_histogram(f"{name}/weight_change", change.detach().float().cpu(), step)
    with SummaryWriter(os.path.join(writer.log_dir, name)) as sub_run:
        sub_run.add_custom_scalars(layout(report, name))
    writer.add_hparams(hparams(report), verdict(report, name), run_name=name, global_step=step)


def layout(report: RepairReport, name: str = "repair") -> dict[str, dict[str, list[Any]]]:
    """Charts of the Custom Scalars tab, in the order in which a reviewer asks; only of tags that the report gives."""
    tags = {tag for scalars in (*search_curves(report, name), *before_after(report, name)) for tag in scalars}
    splits = [split.split for split in report.splits]
    outcome = {
        "Accuracy of each split: 0 before, 1 after": [f"{name}/{split}/accuracy" for split in splits],
        "Broken samples of each split: should stay at 0": [f"{name}/{split}/broken" for split in splits],
        "Targeted samples still wrong: should fall": [f"{name}/{split}/wrong_in_target" for split in splits],
    }
    search = {
        "Best candidate: repaired and broken samples": [f"{name}/search/repaired", f"{name}/search/broken"],
        "Fitness: best and mean of the swarm": [f"{name}/search/best_fitness", f"{name}/search/mean_fitness"],
        "Best candidate: mean loss on failed and passed": [f"{name}/search/loss_failed", f"{name}/search/loss_passed"],
        "Diversity of the swarm": [f"{name}/search/diversity"],
    }
    return {
        title: charts
        for title, charts in (
            (f"{name}: outcome", _charts(outcome, tags)),
            (f"{name}: search", _charts(search, tags)),
        )
        if charts
    }


def hparams(report: RepairReport) -> dict[str, bool | int | float | str]:
    """What was asked for, flat, for a row of the HParams tab."""
    asked: dict[str, Any] = {
        "status": report.status,
        "layer": ", ".join(report.layers),
        "target": report.target,
        "gate": report.gate,
        "task": report.task,
        "seed": report.seed,
    }
    if report.localization is not None:
        asked["n_g"] = report.localization.n_g
        asked["searched_weights"] = report.localization.sizes.get("localized")
    # What was found out goes before what was said, such as a layer `auto`.
    return _flat(report.settings) | _flat(asked)


def _charts(charts: Mapping[str, list[str]], tags: set[str]) -> dict[str, list[Any]]:
    present = {title: [tag for tag in chart if tag in tags] for title, chart in charts.items()}
    # Each entry is a regular expression over tags.
    return {title: ["Multiline", [f"^{re.escape(tag)}$" for tag in chart]] for title, chart in present.items() if chart}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    out: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            plain = isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
            out[f"{prefix}{name}"] = value if plain else str(value)
    return out
