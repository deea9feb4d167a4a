"""Work on a trained LightningModule and its data that changes nothing: inside a fit that makes no step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytorch_lightning as pl

from lightning_nrl._lightning import batch_limit, validating
from lightning_nrl._trainer.continue_training import ContinuedTraining
from lightning_nrl._trainer.loaders import LoaderSource, warn_if_random
from lightning_nrl._trainer.progress import RepairProgress
from lightning_nrl._trainer.trainer_checks import check_namespace
from lightning_nrl._trainer.trainer_state import make_evaluator, untracked
from lightning_nrl.callback import RegressionFreeRepair
from lightning_nrl.callbacks.weight_interpolation import WeightInterpolation
from lightning_nrl.entrypoints.repair import without_training
from lightning_nrl.errors import RepairError, explain
from lightning_nrl.evaluation import Evaluator

__all__ = ["Scene", "look"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Scene:
    """A trained module and its data, as they are inside a fit.

    Attributes:
        model: on its device.
        known: the data that a repair may look at.
        unseen: the data that are only counted.
        calibration: the data that no method looks at, to choose by.
        training: would go on with the training.
        evaluator: the model as it is deployed, and what judges it.
        observer: is told how it goes.
    """

    model: pl.LightningModule
    known: list[LoaderSource]
    unseen: list[LoaderSource]
    calibration: list[LoaderSource]
    training: ContinuedTraining
    evaluator: Evaluator
    observer: RepairProgress


def look(
    what: str,
    work: Callable[[Scene], Result],
    callback: RegressionFreeRepair,
    trainer: pl.Trainer,
    model: pl.LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    whole: bool = False,
    **arguments: Any,
) -> Result:
    """Has something looked at. The model, the trainer and the random state stay as they are, and nothing is written.

    Args:
        what: the name of the result, for an error.
        work: gives it; it may not change the model.
        callback: says which data, task and seed are meant.
        trainer: is used for one `fit` that makes no step.
        model: the module, trained, or to be filled from `ckpt_path`.
        train_dataloaders: as for `fit`.
        val_dataloaders: as for `fit`.
        whole: whether each rank reads all of the data.
        **arguments: `datamodule` and `ckpt_path`, as for `fit`.

    Raises:
        ConfigurationError: the data cannot be used, or the trainer holds a repair or wants a minimum of training.
        RepairError: the work was done in another process.
    """
    check_namespace(trainer)
    found: list[Result] = []

    def inside(trainer: pl.Trainer, module: pl.LightningModule, epochs: int) -> None:
        with validating(trainer), RepairProgress(trainer) as progress:
            found.append(work(_scene(trainer, module, callback, epochs, progress, whole)))

    with untracked(trainer), without_training(trainer, callback, inside):
        trainer.fit(model, train_dataloaders, val_dataloaders, **arguments)
    if not found:
        raise RepairError(
            explain(f"the {what} was made in another process.", "use a strategy that starts no processes of its own.")
        )
    return found[0]


def _scene(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    callback: RegressionFreeRepair,
    epochs: int,
    progress: RepairProgress,
    whole: bool,
) -> Scene:
    limit = batch_limit(trainer)
    how: dict[str, Any] = {"adapter": callback.adapter, "seed": callback.settings.seed, "limit": limit, "whole": whole}
    known, unseen = callback.data.sources(trainer, model, **how)
    calibration = callback.data.calibration_sources(trainer, model, **how)
    warn_if_random(known)
    training = ContinuedTraining(trainer, model, known, epochs, left_out=(RegressionFreeRepair, WeightInterpolation))
    return Scene(model, known, unseen, calibration, training, make_evaluator(trainer, model, callback.task), progress)
