"""Repairing a trained checkpoint, without training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from lightning_nrl._lightning import callbacks_of
from lightning_nrl._trainer.continue_training import EPOCHS, epochs_of, epochs_saved
from lightning_nrl._trainer.trainer_checks import check_namespace, check_strategy
from lightning_nrl._trainer.trainer_state import borrowed
from lightning_nrl.callback import RegressionFreeRepair
from lightning_nrl.entrypoints.arguments import callback_with, check_model
from lightning_nrl.errors import ConfigurationError, RepairError, check_kind, explain
from lightning_nrl.pipeline.repair_module import Outcome
from lightning_nrl.report import RepairReport

__all__ = ["Work", "repair", "without_training"]

Work = Callable[[pl.Trainer, pl.LightningModule, int], Outcome | None]
"""What is done with a trainer, its module, and the epochs that the model was trained for."""


def repair(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: pl.LightningDataModule | None = None,
    ckpt_path: str | Path | None = None,
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
        callback: a `RegressionFreeRepair` that says how to repair, such as one of `from_paper`.
        **arguments: arguments of `RegressionFreeRepair` instead, such as `target=Target.label(3)`.

    Returns:
        The report. Its `files["checkpoint"]` is the repaired checkpoint; the model holds the repaired weights.

    Raises:
        ConfigurationError: an argument cannot be used, or the trainer holds a repair or wants a minimum of training.

    Example::

        report = repair(Trainer(), model, datamodule=dm, ckpt_path="best.ckpt", target=Target.label(3))
    """
    if callback is not None and arguments:
        raise ConfigurationError(
            explain(f"`callback` was given, and {sorted(arguments)} too.", "give the arguments to the callback itself.")
        )
    if callback is not None:
        kind = isinstance(callback, RegressionFreeRepair)
        check_kind("callback", callback, kind, "RegressionFreeRepair", "RegressionFreeRepair(...)")
    chosen = callback if callback is not None else callback_with(**arguments)
    check_namespace(trainer)
    check_model(model, "repair_module")
    with without_training(trainer, chosen, chosen.attempt):
        trainer.fit(model, train_dataloaders, val_dataloaders, datamodule=datamodule, ckpt_path=ckpt_path)
    if chosen.report is None:
        raise RepairError(
            explain(
                "the repair was made in another process, its report is in the files alone.",
                "read `report.json` in the log folder, or use a strategy that starts no processes of its own.",
            )
        )
    return chosen.report


@contextmanager
def without_training(trainer: pl.Trainer, callback: RegressionFreeRepair, work: Work) -> Iterator[None]:
    """Inside, a `fit` works on the model as it is and makes no step; afterwards the trainer is as found (`borrowed`).

    Args:
        trainer: whose `fit` is called inside.
        callback: says what is to be repaired and how.
        work: what is to be done. If an outcome comes of it, it is saved, logged and written into the model.

    Raises:
        ConfigurationError: the trainer holds a repair or wants a minimum of training.
    """
    _check(trainer, callback)
    with borrowed(trainer, _WithoutTraining(callback, work, trainer)), warnings.catch_warnings():
        for text in (
            "The number of training batches",
            "`max_epochs` was not set",
            "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
        ):
            warnings.filterwarnings("ignore", text)
        yield


class _WithoutTraining(pl.Callback):
    """Works at the start of a fit and stops it before its first step.

    Args:
        callback: says how.
        work: what is done.
        trainer: knows how long it trained a module before; a checkpoint that is loaded knows better.
    """

    def __init__(self, callback: RegressionFreeRepair, work: Work, trainer: pl.Trainer) -> None:
        self.callback = callback
        self.work = work
        self.outcome: Outcome | None = None
        fitted = trainer.fit_loop.epoch_progress.current.ready > 0
        self._fitted = trainer.lightning_module if fitted else None
        self._epochs = epochs_of(trainer) if fitted else EPOCHS
        self._saved: int | None = None

    @property
    def state_key(self) -> str:
        return self.callback.state_key

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Order does not matter: nothing else happens in this fit.
        check_strategy(trainer)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved = epochs_saved(checkpoint)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Without a limit, a checkpoint may have any number of epochs. Before, optimizers were configured, and schedules
        # may have asked how long training is.
        trainer.fit_loop.max_epochs = -1
        self.callback.on_fit_start(trainer, pl_module)
        self.callback.on_train_start(trainer, pl_module)
        fitted = self._epochs if pl_module is self._fitted else EPOCHS
        self.outcome = self.work(trainer, pl_module, fitted if self._saved is None else self._saved)
        trainer.should_stop = True

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves only now, since optimizer states and the true step count are loaded after `on_fit_start`."""
        if self.outcome is not None:
            self.callback.finish(trainer, pl_module, self.outcome)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.callback.on_save_checkpoint(trainer, pl_module, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.callback.state_dict()


def _check(trainer: pl.Trainer, callback: RegressionFreeRepair) -> None:
    check_namespace(trainer)
    if callback.start_from != "last":
        raise ConfigurationError(
            explain(
                f"`start_from={callback.start_from!r}` has no meaning without training.",
                "name the checkpoint to start from as `ckpt_path`.",
            )
        )
    if any(isinstance(c, RegressionFreeRepair) for c in callbacks_of(trainer)):
        raise ConfigurationError(
            explain("`trainer` has a RegressionFreeRepair of its own.", "use a trainer without it, or call `fit`.")
        )
    if trainer.min_epochs or (trainer.min_steps or 0) > 0:
        raise ConfigurationError(
            explain(
                "`trainer` has `min_epochs` or `min_steps`, which make it train.",
                "use a trainer without a minimum of training.",
            )
        )
