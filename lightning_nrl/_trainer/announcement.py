"""Prints and logs the report of a saved repair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich import get_console

from lightning_nrl._trainer.lightning.packages import Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import logged_hparams
from lightning_nrl._trainer.tracking.loggers import track
from lightning_nrl._trainer.tracking.repair_log import RepairLog
from lightning_nrl._trainer.tracking.scalars import outcome
from lightning_nrl._utils.state import State
from lightning_nrl.errors import DataWarning, LoggingWarning
from lightning_nrl.report import RepairReport
from lightning_nrl.report.page import Renderable
from lightning_nrl.report.sample_views import SampleView

# Averages over batches or classes differ a little from the share of right samples.
LOGGED_ACCURACY_TOLERANCE = 0.02


def show(report: Renderable) -> None:
    get_console().print(report.to_table())


def announce(
    report: RepairReport,
    trainer: Trainer,
    name: str,
    *,
    changes: State | None,
    verbose: bool,
    views: Sequence[SampleView],
) -> None:
    """Logs a saved repair, with tags that begin with `name`, and prints it if `verbose`.

    Errors become warnings.
    """
    try:
        if trainer.is_global_zero:
            hparams = logged_hparams(trainer)
            log = RepairLog(report, trainer.global_step, name, changes or {}, views, hparams)
            track(log, trainer.loggers)
            if verbose:
                show(report)
        # Lightning passes on tensors, but no numbers, from processes that a strategy has started.
        numbers = {tag: torch.tensor(value) for tag, value in outcome(report, name).items()}
        trainer.callback_metrics.update(numbers)
    except Exception as error:
        rank_zero_warn(
            LoggingWarning(
                f"the report was not shown ({type(error).__name__}: {error}).",
                "the repair and its files are not affected; print `report`.",
            )
        )


def compare_logged_accuracy(trainer: Trainer, report: RepairReport) -> None:
    """Warns if no accuracy that the last validation logged is near ours before the repair."""
    logged = {}
    for name, value in trainer.callback_metrics.items():
        if name.lower().startswith("val") and "acc" in name.lower():
            accuracy = float(value)
            logged[name] = accuracy / 100 if accuracy > 1 else accuracy  # some log percent
    for split in report.splits:
        if not logged or split.split != "val" or not split.classes:
            continue
        counts = split.counts
        accuracy = counts.passed / (counts.passed + counts.repaired + counts.failing)
        name = min(logged, key=lambda name: abs(logged[name] - accuracy))
        if abs(logged[name] - accuracy) > LOGGED_ACCURACY_TOLERANCE:
            rank_zero_warn(
                DataWarning(
                    f"`{name}`: the module logged {logged[name]:.3f} in its last validation, and "
                    f"the repair counted an accuracy of {accuracy:.3f} on the same `val` data.",
                    "if both measure the same, name the logits by `data=DataOptions(output=...)`, "
                    "or pass an `adapter`.",
                )
            )
