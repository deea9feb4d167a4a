"""What a type checker sees of the names at the top; mypy reads it beside the package, and nothing
runs it.
"""

from __future__ import annotations

from pytorch_lightning import LightningModule, Trainer

from lightning_nrl import (
    RegressionFreeRepair,
    RepairInTraining,
    RepairReport,
    Target,
    TrainingHistory,
    compare,
    diagnose,
    repair,
    sweep,
)
from lightning_nrl.analysis.comparison import Comparison
from lightning_nrl.analysis.diagnosis import Diagnosis
from lightning_nrl.study import SweepResult


def calls(
    trainer: Trainer, model: LightningModule
) -> tuple[RepairReport, Diagnosis, Comparison, SweepResult]:
    assert RegressionFreeRepair(Target.label(3)).report is None
    return (
        repair(trainer, model),
        diagnose(trainer, model),
        compare(trainer, model),
        sweep(trainer, model, settings=[{"alpha": 4}]),
    )


def reports(within: RepairInTraining, history: TrainingHistory) -> tuple[list[RepairReport], float]:
    assert within.report is None
    return within.reports, history.seconds
