"""Time limit, progress and ranks in step for a training that goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from typing_extensions import override

from lightning_nrl._trainer.lightning.packages import CallbackBase, LightningModule, Trainer
from lightning_nrl._utils.device import is_out_of_memory
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.interrupts import poll
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import ConfigurationError, OtherRankError, RepairError
from lightning_nrl.methods.budget import PACE_TIME_SHARE, RESERVED_TIME_SHARE, TIMED_BATCHES, WARM_UP_BATCHES

Result = TypeVar("Result")


class CannotTrainError(RepairError):
    """The training cannot go on; the message says why."""


def check_ranks(collective: Collective, error: Exception | None = None, *, is_over: bool = False) -> bool:
    """Meeting of ranks that train, before any exchange, at the end and on failure; true if the time of any is over.

    Every meeting exchanges the same three numbers, so that a rank that fails anywhere meets the others wherever they
    wait next, and all leave the training in one way.
    """
    stuck = isinstance(error, CannotTrainError)
    fatal = error is not None and not stuck
    n_stuck, n_fatal, n_over = collective.sum(torch.tensor([stuck, fatal, is_over])).tolist()
    if n_fatal and not fatal:
        raise OtherRankError("the training that goes on failed on another rank.", "look at its own error.")
    if error is not None:
        raise error
    if n_stuck:
        raise CannotTrainError("it cannot on another rank")
    return bool(n_over)


class TimeBudget(CallbackBase):
    """Keeps ranks in step, stops at `end`, and reports progress; `optional`: any failure is a `CannotTrainError`."""

    def __init__(
        self, end: float, collective: Collective, clock: StageTimer | None = None, *, optional: bool = False
    ) -> None:
        self._end, self._collective, self._clock, self._optional = end, collective, clock, optional
        self._done = 0
        self._has_met_failure = False

    def on_all_ranks(self, work: Callable[[], Result]) -> Result:
        """Runs a part of the training, which all ranks end or none does; a lack of memory is a `CannotTrainError`."""
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            if self._has_met_failure:
                raise  # the rank that failed has met this one already
            failure = error
        if failure is not None and (isinstance(failure, ConfigurationError) or is_out_of_memory(failure)):
            # Without its traceback, which holds what did not fit.
            failure = CannotTrainError(str(failure).partition("\n")[0])
        elif self._optional and failure is not None and not isinstance(failure, RepairError):
            failure = CannotTrainError(f"{type(failure).__name__}: {failure}".partition("\n")[0])
        check_ranks(self._collective, failure)
        return result

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            # What is measured on validation data is not there.
            config.strict = False
        if not pl_module.automatic_optimization:
            # Steps of several optimizers all count; schedules have asked by now.
            trainer.fit_loop.epoch_loop.max_steps = -1

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages gradients over ranks; those that are accumulated are the same on all ranks, and stay so."""
        if self._collective.world_size > 1:
            self.meet()
            _average_gradients(pl_module, self._collective)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        poll()
        self._done += 1
        total = int(trainer.num_training_batches) * int(trainer.max_epochs or 1)
        if self._clock is not None and (self._done % max(1, total // 200) == 0 or self._done == total):
            self._clock.tell(self._done, total)
        is_over = math.isfinite(self._end) and self.meet(is_over=self._is_over(pl_module.device))
        if is_over:
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
    """Stops after a few batches; `epochs` then tells how many fit in the time until `end`."""

    def __init__(self, end: float, collective: Collective, *, optional: bool = False) -> None:
        began = time.perf_counter()
        super().__init__(began + PACE_TIME_SHARE * (end - began), collective, optional=optional)
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
    """Parameters without a gradient on some ranks count as 0 there; without one on any rank they stay without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ranks = collective.sum(torch.tensor([parameter.grad is not None for parameter in parameters]))
    parameters = [parameter for parameter, n in zip(parameters, ranks.tolist(), strict=True) if n]
    if not parameters:
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    mean = collective.sum(torch.cat([p.grad.flatten() for p in parameters])) / collective.world_size  # type: ignore[union-attr]
    for parameter, values in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(values.view_as(parameter))  # type: ignore[union-attr]
