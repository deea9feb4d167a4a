"""A sweep in TensorBoard's HParams tab: a row for each setting, or for each run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Literal

from lightning_nrl._lightning.packages import Logger, rank_zero_only
from lightning_nrl._tracking.loggers import to_each, writer_of
from lightning_nrl.analysis.sweep import Run, SweepResult
from lightning_nrl.errors import check_choice
from lightning_nrl.report.splits import ROLES

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
