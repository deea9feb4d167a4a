"""The row of a repair in TensorBoard's HParams tab, and columns that training's own hyperparameters do not hide.

TensorBoard takes the columns from one run only, whichever it finds first. So they are declared before training logs
its own, in the same run, where the first one counts, and again beside the row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_nrl.report import RepairReport

Plain = bool | int | float | str

ASKED: Mapping[str, Plain] = {
    "repair/gate": "",
    "repair/layer": "",
    "repair/method": "",
    "repair/seed": 0.0,
    "repair/target": "",
    "repair/with fitness": "",
    "repair/with max_time": 0.0,
    "repair/with n_passed": 0.0,
    "repair/with n_weights": 0.0,
    "repair/with task": "",
}
"""Columns of what a repair was asked for, each with a value of its type. The tab sorts names and shows five of its own
accord."""
MEASURED = (
    "repair/accepted",
    "repair/known_repaired_in_target",
    "repair/known_broken",
    "repair/unseen_repaired",
    "repair/unseen_broken",
    "repair/known_repair_rate",
    "repair/known_accuracy",
    "repair/unseen_repair_rate",
    "repair/unseen_break_rate",
    "repair/unseen_nfr",
    "repair/unseen_accuracy",
    "repair/known_regressions",
    "repair/unseen_regressions",
)
"""Columns of what came of it; the tab shows the first five of its own accord."""
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
