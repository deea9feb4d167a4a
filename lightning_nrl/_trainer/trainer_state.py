"""State of a trainer and its model at a repair: callbacks, starting weights, epochs, signals."""

from __future__ import annotations

import math
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_nrl._trainer.lightning.checkpoint_files import reading_checkpoints
from lightning_nrl._trainer.lightning.null_logger import NullLogger
from lightning_nrl._trainer.lightning.packages import (
    Callback,
    Checkpoint,
    LightningModule,
    ModelCheckpoint,
    ProgressBar,
    Trainer,
    callback_kinds,
    class_for,
    rank_zero_only,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import callbacks_of, set_callbacks
from lightning_nrl._trainer.lightning.step_outputs import no_op
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.interrupts import interruptible
from lightning_nrl._utils.preserve import (
    has_own_modes,
    module_flags,
    random_state,
    replaced,
    set_modes,
)
from lightning_nrl.errors import TrainingWarning
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.tasks import Task

DROPPED_CALLBACKS = callback_kinds(
    "BatchSizeFinder Checkpoint DeviceStatsMonitor EarlyStopping LearningRateFinder "
    "LearningRateMonitor ModelSummary ProgressBar Timer"
)
"""Callbacks that tune, save, print or stop training. A copied module trains without them."""
TUNING_CALLBACKS = callback_kinds("BatchSizeFinder LearningRateFinder WeightAveraging")
"""Callbacks that train before `fit` does, or load other weights than a checkpoint's state dict."""
ASSUMED_EPOCHS = 20
"""Number of epochs that is assumed for a training of unknown length."""


@dataclass
class StartingWeights:
    keep: bool = False  # True: the weights stay in the model
    path: str = ""  # path of the loaded checkpoint, or empty


@contextmanager
def prepared_for_dry_fit(
    trainer: Trainer, callback: Callback, *, weights_only: bool
) -> Iterator[None]:
    """Prepares a trainer for one fit without steps: adds a callback and drops `TUNING_CALLBACKS`.

    Restores callbacks, limits, metrics and global random states on exit.
    """
    loop = trainer.fit_loop
    callbacks = callbacks_of(trainer)
    limits = trainer.num_sanity_val_steps, loop.min_epochs, loop.max_epochs
    metrics = [dict(values) for values in _metrics_of(trainer)]
    trainer.num_sanity_val_steps = 0
    kept = [attached for attached in callbacks if not isinstance(attached, TUNING_CALLBACKS)]
    set_callbacks(trainer, [*kept, callback])
    try:
        with random_state(), reading_checkpoints(trainer, "ckpt_path", weights_only=weights_only):
            yield
    finally:
        set_callbacks(trainer, callbacks)
        trainer.num_sanity_val_steps, loop.min_epochs, loop.max_epochs = limits
        trainer.should_stop = False
        for values, earlier in zip(_metrics_of(trainer), metrics, strict=True):
            values.update(earlier | values)


def _metrics_of(trainer: Trainer) -> list[dict[str, Any]]:
    """Returns the metrics that the next fit clears."""
    return [trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics]


@contextmanager
def untracked(
    trainer: Trainer, kept: tuple[type, ...] = (Checkpoint, ProgressBar)
) -> Iterator[None]:
    """Disables loggers and `DROPPED_CALLBACKS`, except those of the classes `kept`, for a block."""
    loggers = trainer.loggers
    callbacks = callbacks_of(trainer)
    active = []
    attributes = {}  # of checkpoint callbacks, such as the best path
    for callback in callbacks:
        if isinstance(callback, kept) or not isinstance(callback, DROPPED_CALLBACKS):
            active.append(callback)
        if isinstance(callback, Checkpoint):
            attributes[callback] = dict(vars(callback))
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer.loggers = [NullLogger(folder) for _ in loggers]
            set_callbacks(trainer, active)
            yield
    finally:
        trainer.loggers = loggers
        set_callbacks(trainer, callbacks)
        for callback, earlier in attributes.items():
            vars(callback).clear()
            vars(callback).update(earlier)


@contextmanager
def starting_weights(
    start_from: str, trainer: Trainer, model: LightningModule
) -> Iterator[StartingWeights]:
    """Loads the weights to repair on all ranks: the current ones (`last`) or the best checkpoint's.

    Buffers that differ by rank, such as batch norm statistics, get the values of the first rank, as
    in a checkpoint. Modules in training mode run their own `train()` again, since Lightning sets
    only the flag `training` after a validation, and LoRA weights that `eval()` has merged would
    stay merged. On exit, everything is restored exactly, unless the block has set `keep` of the
    yielded object.
    """
    path = _best_path(trainer) if start_from == "best" else ""
    start = StartingWeights(path=path)
    own_modes = has_own_modes(model)
    if not path and trainer.world_size == 1 and not own_modes:
        yield start
        return
    collective = Collective.current(model.device)
    written = list(model.buffers())
    if path or own_modes:
        written += model.parameters()
    modules = list(model.modules())
    flags = module_flags(modules)
    tensors = [(tensor, tensor.detach().clone()) for tensor in written]
    try:
        if own_modes:
            modes = [module.training for module in modules]
            for module in modules:
                if module.training:
                    module.train()
            set_modes(modules, modes)
        if path:
            collective.all_or_none(
                partial(_load_best, path, trainer, model),
                "the best checkpoint could not be read on another rank.",
            )
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.copy_(collective.agreed(buffer))
        yield start
    finally:
        if not start.keep:
            with torch.no_grad():
                for tensor, value in tensors:
                    tensor.copy_(value)
            for module, values in zip(modules, flags, strict=True):
                vars(module).update(values)


def _load_best(path: str, trainer: Trainer, model: LightningModule) -> None:
    otherwise = (
        "repair it later by `lightning_nrl.repair(..., ckpt_path=..., weights_only=False)` if you "
        "trust it."
    )
    with reading_checkpoints(trainer, "start_from", otherwise=otherwise):
        checkpoint = trainer.strategy.load_checkpoint(path)
    trainer.strategy.load_model_state_dict(checkpoint, strict=model.strict_loading)


def _best_path(trainer: Trainer) -> str:
    checkpoint = trainer.checkpoint_callback
    path = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
    if not path:
        rank_zero_warn(
            TrainingWarning(
                "`start_from='best'`: no best checkpoint was saved, so the repair starts from the "
                "last weights.",
                "add a ModelCheckpoint with `monitor=`.",
            )
        )
    return path


def epochs_of(trainer: Trainer) -> int:
    """Returns the number of epochs of a training, at least 1.

    An epoch that batch limits cut short counts in part.
    """
    loop = trainer.fit_loop
    loader = trainer.train_dataloader
    epochs = loop.epoch_progress.current.ready
    if isinstance(loader, DataLoader):
        with suppress(TypeError):  # data without a length
            epochs = min(epochs, round(loop.epoch_loop.batch_progress.total.ready / len(loader)))
    return max(1, epochs)


def least_samples_of_epoch(trainer: Trainer, batch_size: int) -> int:
    """Returns a lower bound of the samples in the longest epoch of a training; 0 if unknown."""
    loop = trainer.fit_loop
    n_epochs = loop.epoch_progress.current.ready
    if trainer.ckpt_path or not n_epochs:
        return 0  # a resumed training may have had other batches
    n_batches = math.ceil(loop.epoch_loop.batch_progress.total.ready / n_epochs)
    return max(0, n_batches - 1) * batch_size + 1


def epochs_saved(checkpoint: Mapping[str, Any]) -> int:
    """Returns the number of epochs in a checkpoint, at least 1, or else `ASSUMED_EPOCHS`."""
    try:
        return max(1, int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"]))
    except KeyError:
        return ASSUMED_EPOCHS


@contextmanager
def forward_context(trainer: Trainer, model: LightningModule) -> Iterator[None]:
    """Context for forward passes in the trainer's precision, without `self.log`.

    Lightning refuses `self.log` outside the steps that it runs. An attribute `log` that is not a
    method stays.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, LightningModule) and callable(module.log):
                stack.enter_context(replaced(module, log=no_op, log_dict=no_op))
        stack.enter_context(trainer.precision_plugin.forward_context())
        yield


def make_evaluator(trainer: Trainer, model: LightningModule, task: Task) -> Evaluator:
    """Returns an evaluator with the trainer's device, precision and ranks."""
    context = partial(forward_context, trainer, model)
    return Evaluator(model, task, context, Collective.current(model.device))


@contextmanager
def handle_signals(
    trainer: Trainer, is_decided: Callable[[], bool], saved_in: Callable[[], Path | None]
) -> Iterator[None]:
    """Ends a repair after Ctrl-C or SIGTERM, as Lightning ends a fit, and prints its state.

    `is_decided` returns True once the repair has finished. `saved_in` returns the folder of saved
    steps, or None.
    """

    def terminated() -> BaseException:
        launcher = trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGTERM)
        error: BaseException = class_for(trainer, "pytorch.utilities.exceptions.SIGTERMException")()
        # The default, 0, means success.
        error.code = 128 + signal.SIGTERM  # type: ignore[attr-defined]
        return error

    try:
        with interruptible(terminated=terminated, say=_say):
            yield
    except (KeyboardInterrupt, SystemExit):
        if is_decided():
            _say("The repair had finished: files and weights are those of its report.")
            raise
        text = "The repair was stopped: the weights are unchanged, and no files were written."
        folder = saved_in()
        if folder is not None:
            text += f" The same call resumes after the finished steps ({folder})."
        _say(text)
        raise


@rank_zero_only
def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
