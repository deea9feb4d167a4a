"""Repairing a trained checkpoint, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_nrl._lightning.packages import LightningDataModule, LightningModule, Trainer
from lightning_nrl._trainer.trainer_checks import check_packages
from lightning_nrl.callback import RegressionFreeRepair
from lightning_nrl.entrypoints._arguments import callback_with, check_model
from lightning_nrl.entrypoints._dry_fit import without_training
from lightning_nrl.entrypoints._option_support import check_heeded
from lightning_nrl.errors import ConfigurationError, RepairError, check_kind
from lightning_nrl.report import RepairReport

__all__ = ["repair"]


def repair(
    trainer: Trainer,
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | Path | None = None,
    weights_only: bool = True,
    callback: RegressionFreeRepair | None = None,
    **arguments: Any,
) -> RepairReport:
    """Repairs a trained model: the same report, files and logs as after training, and no training.

    Args:
        trainer: any trainer that could train the model; it is used for one `fit` that makes no step.
        model: the module, trained, or to be filled from `ckpt_path`.
        train_dataloaders: passed samples, unless a data module has them.
        val_dataloaders: failed samples, unless a data module has them.
        datamodule: holds the data, with an optional `repair_dataloader()` for the failed samples.
        ckpt_path: a checkpoint of the model; None: the model as it is.
        weights_only: refuses a checkpoint that holds more than tensors and plain values; False: you trust it.
        callback: a `RegressionFreeRepair` that says how to repair, such as one of `from_paper`.
        **arguments: arguments of `RegressionFreeRepair` instead, such as `target=Target.label(3)`.

    Returns:
        The report. Its `files["checkpoint"]` is the repaired checkpoint; the model holds the repaired weights.

    Raises:
        ConfigurationError: an argument cannot be used, or the trainer holds a repair or wants a minimum of training.

    Example::

        report = repair(Trainer(), model, datamodule=dm, ckpt_path="best.ckpt", target=Target.label(3))
    """
    if callback is None:
        callback = callback_with("repair", **arguments)
    elif arguments:
        raise ConfigurationError(
            f"`callback` was given, and {sorted(arguments)} too.", "give the arguments to the callback itself."
        )
    else:
        kind = isinstance(callback, RegressionFreeRepair)
        check_kind("callback", callback, kind, "RegressionFreeRepair", "RegressionFreeRepair(...)")
        check_heeded("repair", {"data": callback.data})
    check_model(model, "repair_module")
    check_packages(trainer, model=model, datamodule=datamodule)
    with without_training(trainer, callback, callback.attempt, weights_only):
        trainer.fit(model, train_dataloaders, val_dataloaders, datamodule=datamodule, ckpt_path=ckpt_path)
    if callback.report is None:
        raise RepairError(
            "the repair was made in another process, its report is in the files alone.",
            "read `report.json` in the log folder, or use a strategy that starts no processes of its own.",
        )
    return callback.report
