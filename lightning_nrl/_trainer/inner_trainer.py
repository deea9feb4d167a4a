"""A trainer inside a trainer: it trains a copy of the module, shows nothing and keeps nothing."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_nrl._trainer.lightning.packages import (
    LOGGER_NAMES,
    Callback,
    DummyLoggerBase,
    LightningDataModule,
    LightningModule,
    Trainer,
    callback_kinds,
    class_for,
)
from lightning_nrl._trainer.lightning.private_parts import release_copy, shared_with_copies
from lightning_nrl._trainer.step_outputs import nothing
from lightning_nrl._utils.state import State, write
from lightning_nrl.methods._solvers.distill import WEIGHT_DECAY

LEFT_OUT = callback_kinds(
    "BatchSizeFinder Checkpoint DeviceStatsMonitor EarlyStopping LearningRateFinder LearningRateMonitor ModelSummary "
    "ProgressBar Timer"
)
"""Callbacks of a module that tune, save, show or stop, which is not theirs to do here."""
WARM_UP_SHARE = 0.1
"""Of the steps of AdamW in place of a module's own optimizers, those in which its rate rises."""


def copied_module(
    module: LightningModule,
    state: State,
    modes: Sequence[bool],
    *,
    shared: Sequence[object] = (),
    left_out: tuple[type, ...] = (),
    rate: float | None = None,
) -> LightningModule:
    """A copy to be trained in place of the module, which stays as it is, its trainer included.

    All of its hooks run, except those that fetch data and those after training, which save, export or report. `state`
    is put in after `setup`, which may make layers anew; `modes` are the training flags of `module.modules()`; `shared`
    is what the copy shares with the module, such as data sets, and so is what cannot be copied, such as locks and open
    files; callbacks of `left_out` and `LEFT_OUT` are dropped. With a `rate` it gets AdamW for its own optimizers.
    """
    memo: dict[int, Any] = {id(thing): thing for thing in (*shared, *shared_with_copies(module))}
    try:
        new = copy.deepcopy(module, dict(memo))
    except Exception:
        new = copy.deepcopy(module, {**memo, **_not_copied(module, memo)})
    release_copy(new)
    for part, training in zip(new.modules(), modes, strict=True):
        part.training = training
    callbacks = new.configure_callbacks
    hooks: dict[str, Callable[..., Any]] = {
        "prepare_data": nothing,
        "configure_model": partial(write, new, state),
        "configure_callbacks": lambda: _kept(callbacks(), left_out),
        "on_train_end": nothing,
        "on_fit_end": nothing,
    }
    if rate is not None:
        hooks |= {"configure_optimizers": lambda: _adamw(new, rate), "lr_scheduler_step": _step_schedule}
    for name, hook in hooks.items():
        setattr(new, name, hook)
    return new


def copied_data_module(data: LightningDataModule, loader: Any) -> LightningDataModule:
    """A data module with the same data and batch hooks, another trainer to ask, and another loader for training."""
    new = copy.copy(data)
    for name in ("prepare_data", "setup", "teardown"):
        setattr(new, name, nothing)
    new.train_dataloader = lambda: loader  # type: ignore[method-assign]
    return new


def inner_trainer(outer: Trainer, callback: Callback, *, epochs: int, batches: int, folder: str) -> Trainer:
    """A trainer for `epochs` of `batches` on the outer one's device, with its precision, clipping and accumulation."""
    device = outer.strategy.root_device
    trainer: Trainer = class_for(outer, "pytorch.Trainer")(
        accelerator=device.type,
        strategy=class_for(outer, "pytorch.strategies.SingleDeviceStrategy")(device),
        devices=1,
        # Whatever cluster there is, the outer trainer deals with it.
        plugins=[class_for(outer, "fabric.plugins.environments.LightningEnvironment")()],
        precision=outer.precision,
        max_epochs=epochs,
        max_steps=-1 if outer.max_steps < 0 else epochs * -(-batches // outer.accumulate_grad_batches),
        gradient_clip_val=outer.gradient_clip_val,
        gradient_clip_algorithm=outer.gradient_clip_algorithm,
        accumulate_grad_batches=outer.accumulate_grad_batches,
        callbacks=[callback],
        logger=[NullLogger(folder) for _ in outer.loggers],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    return trainer


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning says nothing about a trainer: all of it was said about the outer one."""
    loggers = [logging.getLogger(name) for name in LOGGER_NAMES]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class NullExperiment:
    """Takes whatever is done to it and does nothing, as an experiment that nobody reads."""

    def __getattr__(self, name: str) -> NullExperiment:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> NullExperiment:
        return self

    def __getitem__(self, key: Any) -> NullExperiment:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class NullLogger(DummyLoggerBase):
    """Stands where a logger stood. Lightning's own dummy fails on `self.logger.experiment.config.update(...)`."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    @property
    @override
    def save_dir(self) -> str:
        return self._folder

    @property
    @override
    def log_dir(self) -> str:
        return self._folder

    @property
    @override
    def experiment(self) -> Any:
        return NullExperiment()

    @override
    def __getattr__(self, name: str) -> Any:
        return getattr(NullExperiment(), name)


def _adamw(module: LightningModule, rate: float) -> dict[str, Any]:
    """AdamW whose rate rises over the first steps and falls to 0 along a cosine."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY)
    total = max(1, int(module.trainer.estimated_stepping_batches))
    warm_up = max(1, round(WARM_UP_SHARE * total))

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warm_up)
        return rise * (1 + math.cos(math.pi * min(1.0, step / total))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _step_schedule(scheduler: Any, metric: Any) -> None:
    scheduler.step()


def _kept(callbacks: Sequence[Callback] | Callback, left_out: tuple[type, ...]) -> list[Callback]:
    found = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
    return [callback for callback in found if not isinstance(callback, (*LEFT_OUT, *left_out))]


def _not_copied(module: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """What the attributes of modules hold that cannot be copied, by identity; a result of a graph without the graph."""
    found: dict[int, Any] = {}

    def search(value: Any) -> None:
        if id(value) in memo or id(value) in found or isinstance(value, nn.Module):
            return
        if isinstance(value, Tensor):
            if not value.is_leaf:
                found[id(value)] = value.detach().clone()
            return
        inside = value.values() if isinstance(value, dict) else value
        if isinstance(inside, (list, tuple, set, type({}.values()))):
            for item in inside:
                search(item)
            return
        try:
            copy.deepcopy(value, {**memo, **found})
        except Exception:
            found[id(value)] = value

    for part in module.modules():
        for name, value in vars(part).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                search(value)
    return found
