"""Methods beside each other on a LightningModule and its data, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightning_nrl._lightning.packages import LightningDataModule, LightningModule, Trainer
from lightning_nrl._trainer.trainer_repair import TrainedModel
from lightning_nrl.analysis.comparison import Comparison
from lightning_nrl.analysis.comparison.compare_models import Methods, compare_module, parse_methods
from lightning_nrl.entrypoints._arguments import callback_with, check_model
from lightning_nrl.entrypoints._dry_fit import dry_fit

__all__ = ["compare"]


def compare(
    trainer: Trainer,
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | Path | None = None,
    weights_only: bool = True,
    methods: Methods | None = None,
    unseen: str | DataLoader[Any] | None = "test",
    **arguments: Any,
) -> Comparison:
    """Runs repairs and what people do instead of a repair on one trained model, and counts what each fixes and breaks.

    Each method starts from the same weights with the same seed. The model keeps these weights; the trainer, its logs
    and the random state stay as they are, and no file is written.

    Args:
        trainer: any trainer that could train the model; it is used for one `fit` that makes no step.
        model: the module, trained, or to be filled from `ckpt_path`.
        train_dataloaders: passed samples, unless a data module has them.
        val_dataloaders: failed samples, unless a data module has them.
        datamodule: holds the data, with an optional `repair_dataloader()` for the failed samples.
        ckpt_path: a checkpoint of the model; None: the model as it is.
        weights_only: refuses a checkpoint that holds more than tensors and plain values; False: you trust it.
        methods: names such as `finetune-polish` and `fine-tuning`, or objects, under names of their own if they are a
            mapping; None: every method and baseline that has a name.
        unseen: data that is only counted: `test`, `val`, a DataLoader, or None.
        **arguments: further arguments of `RegressionFreeRepair`, such as `target` and `layer`; `max_time` is what each
            method may take, retraining excepted. docs/options.md says which have an effect; others are refused.

    Returns:
        The comparison: `rich.print` shows its table, `plot()` draws its curves.

    Raises:
        ConfigurationError: an argument or the trainer cannot be used, or no failed sample is in the target.

    Example::

        comparison = compare(Trainer(), model, datamodule=dm, ckpt_path="best.ckpt", target=Target.label(3))
        comparison.plot("comparison.png")
    """
    chosen = parse_methods(methods)
    callback = callback_with("compare", unseen=unseen, **arguments)
    check_model(model, "compare_module")

    def work(trained: TrainedModel) -> Comparison:
        return compare_module(
            trained.evaluator,
            trained.known,
            callback.settings,
            unseen=trained.unseen,
            methods=chosen,
            training=trained.training,
            observer=trained.observer,
        )

    loaders = (train_dataloaders, val_dataloaders)
    source: dict[str, Any] = {"datamodule": datamodule, "ckpt_path": ckpt_path, "weights_only": weights_only}
    return dry_fit(work, callback, trainer, model, *loaders, **source)
