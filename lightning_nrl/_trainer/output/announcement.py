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
from lightning_nrl.errors import LoggingWarning
from lightning_nrl.report import RepairReport
from lightning_nrl.report.page import Renderable
from lightning_nrl.report.sample_views import SampleView


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
