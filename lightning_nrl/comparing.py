"""Methods beside each other on a LightningModule and its data, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from lightning_nrl.as_found import random_state
from lightning_nrl.borrowing import validating
from lightning_nrl.callback import RegressionFreeRepair
from lightning_nrl.collective import Collective
from lightning_nrl.comparison import Comparison, Methods, compare_module, parse_methods
from lightning_nrl.continuing import ContinuedTraining
from lightning_nrl.errors import RepairError, explain
from lightning_nrl.loaders import warn_if_random
from lightning_nrl.progress import RepairProgress
from lightning_nrl.standalone import without_training

__all__ = ["compare"]


def compare(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: pl.LightningDataModule | None = None,
    ckpt_path: str | Path | None = None,
    methods: Methods | None = None,
    unseen: str | DataLoader[Any] | None = "test",
    **arguments: Any,
) -> Comparison:
    """Runs repairs and what people do instead of a repair on one trained model, and counts what each fixes and breaks.

    Each method starts from the same weights with the same seed. The model keeps these weights, the trainer and its logs
    stay as they are, and no file is written.

    Args:
        trainer: any trainer that could train the model; it is used for one `fit` that makes no step.
        model: the module, trained, or to be filled from `ckpt_path`.
        train_dataloaders: passed samples, unless a data module has them.
        val_dataloaders: failed samples, unless a data module has them.
        datamodule: holds the data, with an optional `repair_dataloader()` for the failed samples.
        ckpt_path: a checkpoint of the model; None: the model as it is.
        methods: names such as `constrained` and `fine-tuning`, or objects, under names of their own if they are a
            mapping; None: every method and baseline that has a name.
        unseen: data that is only counted: `test`, `val`, a DataLoader, or None.
        **arguments: further arguments of `RegressionFreeRepair`, such as `target` and `layer`; `max_time` is what each
            method may take, retraining excepted.

    Returns:
        The comparison: `rich.print` shows its table, `plot()` draws its curves.

    Raises:
        ConfigurationError: an argument cannot be used, no failed sample is in the target, or the trainer holds a repair
            or wants a minimum of training.

    Example::

        comparison = compare(Trainer(), model, datamodule=dm, ckpt_path="best.ckpt", target=Target.label(3))
        comparison.plot("comparison.png")
    """
    chosen = parse_methods(methods)
    callback = RegressionFreeRepair(unseen=unseen, **arguments)
    found: list[Comparison] = []

    def work(trainer: pl.Trainer, module: pl.LightningModule, epochs: int) -> None:
        found.append(_compared(trainer, module, callback, chosen, epochs))

    with without_training(trainer, callback, work):
        trainer.fit(model, train_dataloaders, val_dataloaders, datamodule=datamodule, ckpt_path=ckpt_path)
    if not found:
        raise RepairError(
            explain(
                "the comparison was made in another process.", "use a strategy that starts no processes of its own."
            )
        )
    return found[0]


def _compared(
    trainer: pl.Trainer, model: pl.LightningModule, callback: RegressionFreeRepair, methods: Methods, epochs: int
) -> Comparison:
    with random_state(), validating(trainer), RepairProgress(trainer) as progress:
        known, unseen = callback.data.sources(
            trainer,
            model,
            adapter=callback.adapter,
            seed=callback.settings.seed,
            limit=int(trainer.fast_dev_run) or None,  # type: ignore[attr-defined]
        )
        warn_if_random(known)
        return compare_module(
            model,
            known,
            unseen,
            callback.settings,
            methods=methods,
            task=callback.task,
            context=trainer.precision_plugin.forward_context,
            collective=Collective.current(model.device),
            training=ContinuedTraining(trainer, model, known, epochs, left_out=(RegressionFreeRepair,)),
            observer=progress,
        )
