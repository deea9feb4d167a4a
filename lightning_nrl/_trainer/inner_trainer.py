"""A silent inner trainer that trains a copy of the module within a time budget."""

from __future__ import annotations

import copy
import logging
import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_nrl._trainer.lightning.packages import (
    LOGGER_NAMES,
    Callback,
    CallbackBase,
    DummyLoggerBase,
    LightningDataModule,
    LightningModule,
    Trainer,
    callback_kinds,
    class_for,
)
from lightning_nrl._trainer.lightning.private_parts import release_copy, shared_with_copies
from lightning_nrl._trainer.step_outputs import no_op
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.interrupts import poll
from lightning_nrl._utils.state import State, write
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import ConfigurationError, OtherRankError, RepairError, first_line
from lightning_nrl.methods.budget import (
    PACE_TIME_SHARE,
    RESERVED_TIME_SHARE,
    TIMED_BATCHES,
    WARM_UP_BATCHES,
)
from lightning_nrl.methods.solvers.distill import WEIGHT_DECAY

Result = TypeVar("Result")

DROPPED_CALLBACKS = callback_kinds(
    "BatchSizeFinder Checkpoint DeviceStatsMonitor EarlyStopping LearningRateFinder LearningRateMonitor ModelSummary "
    "ProgressBar Timer"
)
"""Callbacks that tune, save, print or stop training. The training of a copied module runs without
them.
"""
LIBRARIES = ("contextlib", "lightning", "lightning_nrl", "pytorch_lightning", "torch")
"""Packages whose code is not the user's own."""
WARM_UP_SHARE = 0.1  # share of the steps in which the learning rate of `_adamw` rises


def copied_module(
    module: LightningModule,
    state: State,
    modes: Sequence[bool],
    *,
    shared: Sequence[object] = (),
    left_out: tuple[type, ...] = (),
    rate: float | None = None,
) -> LightningModule:
    """Copies a module for training; leaves the module and its trainer unchanged.

    Hooks that download data, and hooks after training (which save, export or report), do nothing in
    the copy.

    Args:
        module: the module to copy.
        state: weights that the copy gets after `setup`, which may create layers again.
        modes: training flag of each of `module.modules()`.
        shared: objects to share with the copy, such as data sets. Locks and open files are always
            shared.
        left_out: classes of callbacks that the copy drops in addition to `DROPPED_CALLBACKS`.
        rate: learning rate of an AdamW that replaces the module's optimizers; None: keep the
            module's optimizers.
    """
    memo: dict[int, Any] = {id(thing): thing for thing in (*shared, *shared_with_copies(module))}
    with torch.no_grad():  # so that parameters of scripted modules stay leaves
        try:
            new = copy.deepcopy(module, dict(memo))
        except Exception:
            new = copy.deepcopy(module, {**memo, **_uncopyable(module, memo)})
    for old, own in zip(module.parameters(), new.parameters(), strict=True):
        own.requires_grad_(old.requires_grad)
    release_copy(new)
    for part, training in zip(new.modules(), modes, strict=True):
        part.training = training
    callbacks = new.configure_callbacks
    hooks: dict[str, Callable[..., Any]] = {
        "prepare_data": no_op,
        "configure_model": partial(write, new, state),
        "configure_callbacks": lambda: _kept_callbacks(callbacks(), left_out),
        "on_train_end": no_op,
        "on_fit_end": no_op,
    }
    if rate is not None:
        hooks |= {
            "configure_optimizers": lambda: _adamw(new, rate),
            "lr_scheduler_step": lambda scheduler, metric: scheduler.step(),
        }
    for name, hook in hooks.items():
        setattr(new, name, hook)
    return new


def copied_data_module(data: LightningDataModule, loader: Any) -> LightningDataModule:
    """Copies a data module for another trainer. The copy has the training loader `loader`; data are
    not copied.
    """
    new = copy.copy(data)
    for name in ("prepare_data", "setup", "teardown"):
        setattr(new, name, no_op)
    new.train_dataloader = lambda: loader  # type: ignore[method-assign]
    return new


def inner_trainer(
    outer: Trainer, callback: Callback, *, epochs: int, batches: int, folder: str
) -> Trainer:
    """Returns a trainer with the device, precision, gradient clipping and accumulation of the
    trainer `outer`.
    """
    device = outer.strategy.root_device
    trainer: Trainer = class_for(outer, "pytorch.Trainer")(
        accelerator=device.type,
        strategy=class_for(outer, "pytorch.strategies.SingleDeviceStrategy")(device),
        devices=1,
        # The outer trainer handles the cluster.
        plugins=[class_for(outer, "fabric.plugins.environments.LightningEnvironment")()],
        precision=outer.precision,
        max_epochs=epochs,
        max_steps=-1
        if outer.max_steps < 0
        else epochs * -(-batches // outer.accumulate_grad_batches),
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
    """Silences Lightning's log and all warnings for a block, since the user's trainer has shown the
    same messages.
    """
    levels = {logger: logger.level for logger in map(logging.getLogger, LOGGER_NAMES)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


class NullExperiment:
    """A logger experiment that accepts any call and does nothing."""

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
    """A logger that writes nothing. Lightning's `DummyLogger` fails on
    `self.logger.experiment.config.update(...)`.
    """

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
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY)
    total = max(1, int(module.trainer.estimated_stepping_batches))
    warm_up = max(1, round(WARM_UP_SHARE * total))

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warm_up)
        return rise * (1 + math.cos(math.pi * min(1.0, step / total))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _kept_callbacks(
    callbacks: Sequence[Callback] | Callback, left_out: tuple[type, ...]
) -> list[Callback]:
    found = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
    return [
        callback for callback in found if not isinstance(callback, (*DROPPED_CALLBACKS, *left_out))
    ]


def _uncopyable(module: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    found: dict[int, Any] = {}

    def search(value: Any) -> None:
        if id(value) in memo or id(value) in found or isinstance(value, nn.Module):
            return
        if isinstance(value, Tensor):
            if not value.is_leaf:
                found[id(value)] = value.detach().clone()  # a computed tensor, without its graph
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


class CannotTrainError(RepairError):
    """The training cannot continue. The message is empty if the training failed on another rank."""


def describe_failure(error: Exception) -> str:
    """Returns an error's class and message, and the last line of the user's own code in its
    traceback.
    """
    text = str(error).strip()
    if "\nOriginal Traceback" in text:
        return f"{text.splitlines()[-1]} (in a DataLoader worker)"
    places = list(traceback.walk_tb(error.__traceback__))
    own = [
        place
        for place in places
        if place[0].f_globals.get("__name__", "").partition(".")[0] not in LIBRARIES
    ]
    frame, line = (own or places)[-1]
    code = frame.f_code
    return f"{type(error).__name__}: {first_line(error)} ({code.co_name}, {Path(code.co_filename).name}:{line})"


def check_ranks(
    collective: Collective, error: Exception | None = None, *, is_over: bool = False
) -> bool:
    """Returns True on all ranks if time is over on at least one rank. All ranks raise if one rank
    gives an `error`.

    Every call exchanges the same three numbers. So a rank that fails cannot leave the others
    waiting in another call.
    """
    stuck = isinstance(error, CannotTrainError)
    fatal = error is not None and not stuck
    n_stuck, n_fatal, n_over = collective.sum(torch.tensor([stuck, fatal, is_over])).tolist()
    if n_fatal and not fatal:
        raise OtherRankError(
            "the continued training failed on another rank.", "look at the error of that rank."
        )
    if error is not None:
        raise error
    if n_stuck:
        raise CannotTrainError("")
    return bool(n_over)


class TimeBudget(CallbackBase):
    """Callback that keeps ranks in step, stops training when `time.perf_counter()` is `end`, and
    reports progress.
    """

    def __init__(self, end: float, collective: Collective, clock: StageTimer | None = None) -> None:
        self._end, self._collective, self._clock = end, collective, clock
        self._done = self._per_epoch = 0
        self._has_met_failure = False
        self.halfway: Callable[[LightningModule], bool] | None = (
            None  # runs after half of the epochs; False: stop
        )
        self.has_ended = False

    @property
    def epochs_done(self) -> float:
        return self._done / max(1, self._per_epoch)

    def on_all_ranks(self, work: Callable[[], Result]) -> Result:
        """Returns `work()`. If it fails on one rank, all ranks raise. Errors in user code become
        `CannotTrainError`.
        """
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            if self._has_met_failure:
                raise  # the ranks have exchanged the failure already
            failure = error
        if isinstance(failure, ConfigurationError):
            failure = CannotTrainError(first_line(failure))
        elif failure is not None and not isinstance(failure, RepairError):
            # Drop the traceback, which may keep tensors alive when memory has run out.
            failure = CannotTrainError(describe_failure(failure))
        check_ranks(self._collective, failure)
        return result

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            # Schedules may ask for validation metrics, which do not exist here.
            config.strict = False
        if not pl_module.automatic_optimization:
            # The steps of all optimizers count here, so the limit would be met early. Schedules
            # have read it by now.
            trainer.fit_loop.epoch_loop.max_steps = -1

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages all gradients over ranks. This does not change gradients that are equal on all
        ranks already.
        """
        if self._collective.world_size > 1:
            self.meet()
            _average_gradients(pl_module, self._collective)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        poll()
        self._done, self._per_epoch = self._done + 1, int(trainer.num_training_batches)
        total = self._per_epoch * int(trainer.max_epochs or 1)
        if self._clock is not None and (
            self._done % max(1, total // 200) == 0 or self._done == total
        ):
            self._clock.tell(self._done, total)
        is_over = math.isfinite(self._end) and self.meet(is_over=self._is_over(pl_module.device))
        if is_over:
            trainer.should_stop = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        half = max(1, int(trainer.max_epochs or 1) // 2)
        if (
            self.halfway is not None
            and trainer.current_epoch + 1 == half
            and not trainer.should_stop
        ):
            self.has_ended = not self.halfway(pl_module)
            trainer.should_stop = self.has_ended

    def meet(self, is_over: bool = False) -> bool:
        try:
            return check_ranks(self._collective, is_over=is_over)
        except RepairError:
            self._has_met_failure = True
            raise

    def _is_over(self, device: torch.device) -> bool:
        return time.perf_counter() > self._end


class TrainingTrial(TimeBudget):
    """Callback that times a few batches and stops training. Then `epochs(end)` says how many epochs
    fit until `end`.
    """

    def __init__(self, end: float, collective: Collective) -> None:
        began = time.perf_counter()
        super().__init__(began + PACE_TIME_SHARE * (end - began), collective)
        self._ends: list[float] = []
        self._epoch = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._epoch = int(trainer.num_training_batches)
        self._ends = [time.perf_counter()]

    def epochs(self, end: float) -> int:
        if len(self._ends) < 2:
            return 0
        started = self._ends[1] - self._ends[0]
        even = self._ends[WARM_UP_BATCHES:] if len(self._ends) > WARM_UP_BATCHES + 1 else self._ends
        batch = (even[-1] - even[0]) / (len(even) - 1)
        left = (end - time.perf_counter()) * (1 - RESERVED_TIME_SHARE) - started
        return int(left / max(batch * self._epoch, 1e-9))

    def _is_over(self, device: torch.device) -> bool:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._ends.append(time.perf_counter())
        return len(self._ends) > WARM_UP_BATCHES + TIMED_BATCHES or super()._is_over(device)


@torch.no_grad()
def _average_gradients(model: LightningModule, collective: Collective) -> None:
    # A missing gradient counts as 0, unless it is missing on all ranks: then it stays missing.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ranks = collective.sum(torch.tensor([parameter.grad is not None for parameter in parameters]))
    parameters = [parameter for parameter, n in zip(parameters, ranks.tolist(), strict=True) if n]
    if not parameters:
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    mean = collective.sum(torch.cat([p.grad.flatten() for p in parameters])) / collective.world_size  # type: ignore[union-attr]
    for parameter, values in zip(
        parameters, mean.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad.copy_(values.view_as(parameter))  # type: ignore[union-attr]
