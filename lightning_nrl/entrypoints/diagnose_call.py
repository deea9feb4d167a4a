"""What can be known before a repair of a LightningModule, without training and without a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_nrl._lightning.packages import LightningDataModule, LightningModule, Trainer
from lightning_nrl._trainer.trainer_repair import TrainedModel
from lightning_nrl.analysis.diagnosis import Diagnosis, diagnose_module
from lightning_nrl.entrypoints._arguments import callback_with, check_model
from lightning_nrl.entrypoints._dry_fit import dry_fit

__all__ = ["diagnose"]


def diagnose(
    trainer: Trainer,
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | Path | None = None,
    weights_only: bool = True,
    history: str | Path | None = None,
    **arguments: Any,
) -> Diagnosis:
    """Says before a repair what can be fixed, what stands in the way, where there is room, what it costs, what to do.

    It takes about as long as two evaluations of the known data and some seconds. The model keeps its weights, the
    trainer and its logs stay as they are, and no file is written.

    Args:
        trainer: any trainer that could train the model; it is used for one `fit` that makes no step.
        model: the module, trained, or to be filled from `ckpt_path`.
        train_dataloaders: passed samples, unless a data module has them.
        val_dataloaders: failed samples, unless a data module has them.
        datamodule: holds the data, with an optional `repair_dataloader()` for the failed samples.
        ckpt_path: a checkpoint of the model; None: the model as it is.
        weights_only: refuses a checkpoint that holds more than tensors and plain values; False: you trust it.
        history: the folder that `TrainingHistory` has written: notes say which targets were never learnt, which were
            forgotten, and which of the former have a label that looks wrong.
        **arguments: arguments of `RegressionFreeRepair`, so that a repair can be given the same. Those that say which
            failures and data are meant (`target`, `task`, `data`) and `seed` matter here.

    Returns:
        The diagnosis: `rich.print` shows its tables, `plot()` draws it, `advice` says what to do.

    Raises:
        ConfigurationError: an argument cannot be used, or the trainer holds a repair or wants a minimum of training.
        EvaluationError: the model gives losses that are not finite; the samples are named.

    Example::

        diagnosis = diagnose(Trainer(), model, datamodule=dm, ckpt_path="best.ckpt", target=Target.label(3))
        print(diagnosis.advice)
    """
    callback = callback_with("diagnose", **arguments)
    check_model(model, "diagnose_module")

    def work(trained: TrainedModel) -> Diagnosis:
        training = trained.training
        epochs = None if training.obstacle else training.epochs
        return diagnose_module(
            trained.evaluator,
            trained.known,
            callback.settings,
            epochs=epochs,
            history=history,
            observer=trained.observer,
        )

    loaders = (train_dataloaders, val_dataloaders)
    source: dict[str, Any] = {"datamodule": datamodule, "ckpt_path": ckpt_path, "weights_only": weights_only}
    return dry_fit(work, callback, trainer, model, *loaders, **source)
