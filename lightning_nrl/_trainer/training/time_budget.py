"""`TimeBudget`, a callback that ends a training in time and keeps ranks in step, and its errors."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from lightning_nrl._trainer.lightning.packages import CallbackBase, LightningModule, Trainer
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.interrupts import poll
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import ConfigurationError, RepairError, first_line
from lightning_nrl.methods.budget import (
    PACE_TIME_SHARE,
    RESERVED_TIME_SHARE,
    TIMED_BATCHES,
    WARM_UP_BATCHES,
)

Result = TypeVar("Result")

LIBRARIES = ("contextlib", "lightning", "lightning_nrl", "pytorch_lightning", "torch")
"""Packages whose code is not the user's own."""
N_REPORTS = 200  # of progress in a training; a user sees no finer steps


class CannotTrainError(RepairError):
    """The training cannot continue. The message is empty if the training failed on another rank."""


def describe_failure(error: Exception) -> str:
    """Returns an error's class and message, and the last line of the user's code in its trace."""
    text = str(error).strip()
    if "\nOriginal Traceback" in text:
        return f"{text.splitlines()[-1]} (in a DataLoader worker)"
    calls = list(traceback.walk_tb(error.__traceback__))
    users_calls = []
    for frame, line in calls:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in LIBRARIES:
            users_calls.append((frame, line))
    frame, line = (users_calls or calls)[-1]
    place = f"{frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}:{line}"
    return f"{type(error).__name__}: {first_line(error)} ({place})"


def check_ranks(
    collective: Collective, error: Exception | None = None, *, is_over: bool = False
) -> bool:
    """Returns True on all ranks if time is over on one of them; all raise if one gives an `error`.

    Every call exchanges the same three numbers. So a rank that fails cannot leave the others
    waiting in another call.
    """
    stuck = isinstance(error, CannotTrainError)
    fatal = error is not None and not stuck
    n_stuck, n_fatal, n_over = collective.sum(torch.tensor([stuck, fatal, is_over])).tolist()
    if n_fatal:
        failed = "the continued training failed on another rank."
        fatal_error = error if fatal else None
        raise fatal_error or collective.error_elsewhere(failed, fatal_error)
    if error is not None:
        raise error
    if n_stuck:
        raise CannotTrainError("")
    return bool(n_over)


class TimeBudget(CallbackBase):
    """Callback that keeps ranks in step, stops training in time, and reports progress.

    Training stops when `time.perf_counter()` is `end`.
    """

    def __init__(self, end: float, collective: Collective, clock: StageTimer | None = None) -> None:
        self._end = end
        self._collective = collective
        self._clock = clock
        self._done = self._per_epoch = 0
        self._has_met_failure = False

    @property
    def epochs_done(self) -> float:
        return self._done / max(1, self._per_epoch)

    def on_all_ranks(self, work: Callable[[], Result]) -> Result:
        """Returns `work()`; all ranks raise if it fails on one of them.

        Errors in user code become `CannotTrainError`.
        """
        failure = None
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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            # Schedules may ask for validation metrics, which do not exist here.
            config.strict = False
        if not pl_module.automatic_optimization:
            # The steps of all optimizers count here, so the limit would be met early. Schedules
            # have read it by now.
            trainer.fit_loop.epoch_loop.max_steps = -1

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning has bound these to the module, which would stay in memory.
        self.log = self.log_dict = None

    @torch.no_grad()
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages all gradients over ranks, which changes nothing if they are equal already."""
        if self._collective.world_size > 1:
            self.meet()
            parameters = list(pl_module.parameters())
            self._collective.sum_gradients(parameters)
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= self._collective.world_size

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        poll()
        self._done += 1
        self._per_epoch = int(trainer.num_training_batches)
        total = self._per_epoch * int(trainer.max_epochs or 1)
        is_due = self._done % max(1, total // N_REPORTS) == 0 or self._done == total
        if self._clock is not None and is_due:
            self._clock.tell(self._done, total)
        if math.isfinite(self._end) and self.meet(is_over=self._is_over(pl_module.device)):
            trainer.should_stop = True

    def meet(self, is_over: bool = False) -> bool:
        try:
            return check_ranks(self._collective, is_over=is_over)
        except RepairError:
            self._has_met_failure = True
            raise

    def _is_over(self, device: torch.device) -> bool:
        return time.perf_counter() > self._end


class TrainingTrial(TimeBudget):
    """Callback that times a few batches and stops training.

    Then `epochs(end)` says how many epochs fit until `end`, also a part of one.
    """

    def __init__(self, end: float, collective: Collective) -> None:
        began = time.perf_counter()
        super().__init__(began + PACE_TIME_SHARE * (end - began), collective)
        self._ends: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._ends = [time.perf_counter()]

    def epochs(self, end: float) -> float:
        if len(self._ends) < 2:
            return 0.0
        started = self._ends[1] - self._ends[0]
        even = self._ends
        if len(even) > WARM_UP_BATCHES + 1:
            even = even[WARM_UP_BATCHES:]
        batch = (even[-1] - even[0]) / (len(even) - 1)
        left = (end - time.perf_counter()) * (1 - RESERVED_TIME_SHARE) - started
        return left / max(batch * self._per_epoch, 1e-9)

    def _is_over(self, device: torch.device) -> bool:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._ends.append(time.perf_counter())
        return len(self._ends) > WARM_UP_BATCHES + TIMED_BATCHES or super()._is_over(device)
