"""`repair`, `diagnose` and `compare` for a trained model and its Trainer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from lightning_nrl._trainer.lightning.packages import (
    CallbackBase,
    LightningDataModule,
    LightningModule,
    Trainer,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import (
    CheckpointState,
    callbacks_of_class,
    restore_training,
    starts_own_processes,
)
from lightning_nrl._trainer.trainer_checks import check_packages, check_strategy
from lightning_nrl._trainer.trainer_repair import TrainedModel
from lightning_nrl._trainer.trainer_state import (
    ASSUMED_EPOCHS,
    epochs_of,
    epochs_saved,
    prepared_for_dry_fit,
    untracked,
)
from lightning_nrl._utils.formatting import percent
from lightning_nrl._utils.preserve import loading_mode
from lightning_nrl.analysis.comparison import Comparison, Methods, compare_module, parse_methods
from lightning_nrl.analysis.diagnosis import Diagnosis, diagnose_module
from lightning_nrl.callbacks.repair import RegressionFreeRepair
from lightning_nrl.entrypoints.arguments import callback_with, check_model, check_used
from lightning_nrl.errors import ConfigurationError, RepairError, TrainingWarning, check_kind
from lightning_nrl.pipeline.repair_module import Outcome
from lightning_nrl.records.splits import SplitReport, by_role, pool
from lightning_nrl.report import RepairReport, Report

Result = TypeVar("Result", bound=Report)
Work = Callable[[Trainer, LightningModule, int], Outcome | None]
"""The last argument is the number of epochs that the model has trained."""
LEAST_ACCURACY = 0.1
"""Accuracy of a trained model, where 0 is always the most frequent class and 1 is perfect.

Untrained networks are near 0 or below.
"""
IGNORED_WARNINGS = (
    "The number of training batches|`max_epochs` was not set|"
    "Be aware that when using `ckpt_path`, callbacks"
)
"""Warnings of Lightning that a fit without steps causes."""


def dry_fit(
    work: Callable[[TrainedModel], Result],
    callback: RegressionFreeRepair,
    trainer: Trainer,
    model: LightningModule,
    ckpt_path: str | Path | None,
    weights_only: bool,
    *,
    whole: bool = False,
    **data: Any,
) -> Result:
    """Returns the result of `work`, run in a `fit` without steps.

    Model, trainer and random state do not change. `callback` has the data options, the task and the
    seed. `data` are arguments of `Trainer.fit`. With `whole`, each rank reads all samples instead
    of its share.
    """
    check_packages(trainer, model=model, datamodule=data["datamodule"])
    if starts_own_processes(trainer):
        raise ConfigurationError(
            f"`strategy`: {type(trainer.strategy).__name__} starts processes of its own, which "
            "cannot return the results.",
            "use one device, or `strategy='ddp'`.",
        )
    results: list[Result] = []

    def run(trainer: Trainer, module: LightningModule, epochs: int) -> None:
        with callback.trainer_repair.opened(trainer, module, epochs, whole=whole) as trained:
            result = work(trained)
            provenance = result.provenance.loaded_from(trainer.ckpt_path)
            results.append(replace(result, provenance=provenance))

    with untracked(trainer), without_training(trainer, callback, run, weights_only):
        trainer.fit(model, ckpt_path=ckpt_path, **data)
    return results[0]


@contextmanager
def without_training(
    trainer: Trainer, callback: RegressionFreeRepair, work: Work, weights_only: bool
) -> Iterator[None]:
    """Makes the next `fit` run `work` instead of training.

    If `work` returns an outcome, saves, logs and applies it.
    """
    for attached in callbacks_of_class(trainer, RegressionFreeRepair):
        raise ConfigurationError(
            f"`trainer` has a {type(attached).__name__} of its own.",
            "use a trainer without it, or call `fit`.",
        )
    if trainer.min_epochs or (trainer.min_steps or 0) > 0:
        raise ConfigurationError(
            "`trainer` has `min_epochs` or `min_steps`, which make it train.",
            "use a trainer without a minimum of training.",
        )
    check_strategy(trainer)
    replacement = _WithoutTraining(callback, work, trainer)
    with (
        warnings.catch_warnings(),
        prepared_for_dry_fit(trainer, replacement, weights_only=weights_only),
    ):
        warnings.filterwarnings("ignore", IGNORED_WARNINGS)
        yield


class _WithoutTraining(CallbackBase):
    def __init__(self, callback: RegressionFreeRepair, work: Work, trainer: Trainer) -> None:
        self.callback = callback
        self.work = work
        self.outcome: Outcome | None = None
        self._misfit = ""  # why the states of optimizers could not be loaded
        self._loading = ExitStack()
        # Epochs of the trainer's last fit, or of the checkpoint that is loaded.
        self._fitted: LightningModule | None = None
        self._epochs = ASSUMED_EPOCHS
        if trainer.fit_loop.epoch_progress.current.ready > 0:
            self._fitted, self._epochs = trainer.lightning_module, epochs_of(trainer)

    @property
    def state_key(self) -> str:
        return self.callback.state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # An adapter that `eval()` has merged would be merged into the loaded weights again.
        def before_loading(*args: object) -> None:
            self._loading.enter_context(loading_mode(pl_module))

        self._loading.callback(pl_module.register_load_state_dict_pre_hook(before_loading).remove)

    def on_exception(self, *args: object) -> None:
        self._loading.close()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: CheckpointState
    ) -> None:
        self._fitted, self._epochs = pl_module, epochs_saved(checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loading.close()
        self._misfit = restore_training(trainer)
        # No limit, since a checkpoint may have reached it. Not set earlier, since schedules read
        # the limit when optimizers are configured.
        trainer.fit_loop.max_epochs = -1
        self.callback.on_fit_start(trainer, pl_module)
        self.callback.on_train_start(trainer, pl_module)
        epochs = self._epochs if pl_module is self._fitted else ASSUMED_EPOCHS
        with self.callback.handle_signals(trainer):
            self.outcome = self.work(trainer, pl_module, epochs)
        trainer.should_stop = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.outcome is not None:
            if self._misfit and self.outcome.parameters is not None:
                rank_zero_warn(
                    TrainingWarning(
                        "`ckpt_path`: the states of its optimizers cannot be loaded "
                        f"({self._misfit}).",
                        "a training that goes on from `repaired.ckpt` begins with new ones.",
                    )
                )
            with self.callback.handle_signals(trainer):
                name = self.callback.save_outcome(trainer, pl_module, self.outcome)
            self.callback.announce(trainer, self.outcome, name)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.callback.teardown(trainer, pl_module, stage)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: CheckpointState
    ) -> None:
        self.callback.on_save_checkpoint(trainer, pl_module, checkpoint)


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
    """Repairs a trained model, like a `RegressionFreeRepair` after a `fit`.

    Writes the same report, files and logs.

    Args:
        trainer: a trainer for the model, used for one `fit` without steps.
        model: the trained module, or a module into which `ckpt_path` is loaded.
        train_dataloaders: data for the passed samples; None: the train data of `datamodule`, or of
            the module itself.
        val_dataloaders: data for the failed samples; None: the validation data of `datamodule`, or
            of the module.
        datamodule: data module. A method `repair_dataloader()`, if it exists, returns the data for
            the failed samples.
        ckpt_path: checkpoint of the model; None: the model keeps its current weights.
        weights_only: True: refuse a checkpoint with other objects than tensors and plain values;
            False: trust it.
        callback: a `RegressionFreeRepair` with all settings, such as
            `RegressionFreeRepair.from_paper("EXP-B1")`.
        **arguments: arguments of `RegressionFreeRepair`, such as `target=Target.label(3)`, if
            `callback` is None.

    Returns:
        The report. If its `status` is `repaired`, the new weights are in the model and in its
        `files["checkpoint"]`.

    Raises:
        ConfigurationError: an argument is invalid, or the trainer has a repair callback,
            `min_epochs` or `min_steps`.

    Example::

        target = Target.label(3)
        report = repair(Trainer(), model, datamodule=dm, ckpt_path="best.ckpt", target=target)
    """
    began = time.perf_counter()
    if callback is None:
        callback = callback_with("repair", **arguments)
    elif arguments:
        raise ConfigurationError(
            f"`callback` was given, and {sorted(arguments)} too.",
            "give the arguments to the callback itself.",
        )
    else:
        fits = isinstance(callback, RegressionFreeRepair)
        check_kind("callback", callback, fits, "RegressionFreeRepair", "RegressionFreeRepair(...)")
        check_used("repair", {"data": callback.data})
    check_model(model, "repair_module")
    check_packages(trainer, model=model, datamodule=datamodule)
    attempt = partial(callback.attempt, began=began)
    with without_training(trainer, callback, attempt, weights_only):
        trainer.fit(
            model, train_dataloaders, val_dataloaders, datamodule=datamodule, ckpt_path=ckpt_path
        )
    if callback.report is None:
        raise RepairError(
            "the repair ran in another process, and its report is only in the files.",
            "read `report.json` in the log folder, "
            "or use a strategy that starts no processes of its own.",
        )
    if ckpt_path is None:
        _warn_if_untrained(callback.report)
    return callback.report


def _warn_if_untrained(report: RepairReport) -> None:
    known = by_role(report.splits)["known"]
    if not all(map(_is_at_chance, known)):
        return
    accuracy = percent(pool(known).counts.accuracy_before)
    rank_zero_warn(
        TrainingWarning(
            f"`ckpt_path` is None, and the model gets {accuracy} of the known samples right, no "
            "more than chance: its weights seem to be untrained.",
            "load the trained weights: `repair(trainer, model, ckpt_path='best.ckpt')`.",
        )
    )


def _is_at_chance(split: SplitReport) -> bool:
    """True if accuracy is hardly above the share of the most frequent class."""
    sizes = [samples.counts.n for samples in split.classes]
    if len(sizes) < 2:
        return False
    chance = max(sizes) / sum(sizes)
    return split.counts.accuracy_before < chance + LEAST_ACCURACY * (1 - chance)


def diagnose(
    trainer: Trainer,
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | Path | None = None,
    weights_only: bool = True,
    **arguments: Any,
) -> Diagnosis:
    """Predicts which failures a repair can fix, what limits the repair, and how long it takes.

    This takes about as long as two evaluations of the known data, plus some seconds. It changes
    neither model nor trainer, and writes no file. All arguments are those of `repair`. Of the
    arguments of `RegressionFreeRepair`, only `target`, `task`, `data` and `seed` have an effect.

    Returns:
        The diagnosis: `rich.print` shows its tables, `plot()` draws it, `advice` recommends a next
        step.

    Raises:
        EvaluationError: the losses of some samples are not finite. The message names these samples.

    Example::

        target = Target.label(3)
        diagnosis = diagnose(Trainer(), model, datamodule=dm, ckpt_path="best.ckpt", target=target)
        print(diagnosis.advice)
    """
    callback = callback_with("diagnose", **arguments)
    check_model(model, "diagnose_module")

    def work(trained: TrainedModel) -> Diagnosis:
        return diagnose_module(
            trained.evaluator,
            trained.known,
            callback.settings,
            epochs=None if trained.training.obstacle else trained.training.epochs,
            observer=trained.observer,
        )

    return dry_fit(
        work,
        callback,
        trainer,
        model,
        ckpt_path,
        weights_only,
        train_dataloaders=train_dataloaders,
        val_dataloaders=val_dataloaders,
        datamodule=datamodule,
    )


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
    """Runs repair methods and baselines, and counts the samples that each repairs and breaks.

    Each method starts from the same weights with the same seed and may take `max_time` seconds;
    only retraining may take longer. Model, trainer and random state are not changed, and no file is
    written. All arguments except `methods` are those of `repair`; an argument without an effect is
    refused (see docs/options.md).

    `methods` is a list of names, such as `finetune-polish` and `fine-tuning`, or of method objects,
    or a mapping from your own names to such methods. None: the methods and baselines that a
    comparison runs by default.

    Returns:
        The comparison: `rich.print` shows its table, `plot()` draws its curves.

    Example::

        target = Target.label(3)
        comparison = compare(Trainer(), model, datamodule=dm, ckpt_path="best.ckpt", target=target)
        comparison.plot("comparison.png")
    """
    parsed_methods = parse_methods(methods)
    callback = callback_with("compare", unseen=unseen, **arguments)
    check_model(model, "compare_module")

    def work(trained: TrainedModel) -> Comparison:
        return compare_module(
            trained.evaluator,
            trained.known,
            callback.settings,
            unseen=trained.unseen,
            methods=parsed_methods,
            training=trained.training,
            observer=trained.observer,
        )

    return dry_fit(
        work,
        callback,
        trainer,
        model,
        ckpt_path,
        weights_only,
        train_dataloaders=train_dataloaders,
        val_dataloaders=val_dataloaders,
        datamodule=datamodule,
    )
