"""The course of a training that goes on: ranks in step, the time kept, and word given of how far it is."""

from __future__ import annotations

import math
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.timing import StageTimer

__all__ = ["TrainingBudget", "TrainingTrial"]

WARM_UP, TIMED = 3, 10
"""Batches before the pace is even, and batches that it is measured on."""
TRIAL = 0.1
"""Share of the time that measuring the pace may take."""
RESERVE = 0.1
"""Share of the time that is kept for a pace slower than it was measured."""


class TrainingBudget(Callback):
    """Keeps ranks in step, stops when the time is over, and tells how far training is.

    Args:
        end: when the time is over, by `time.perf_counter`.
        collective: the ranks that train.
        clock: is told.
    """

    def __init__(self, end: float, collective: Collective, clock: StageTimer | None = None) -> None:
        self._end, self._collective, self._clock = end, collective, clock
        self._done = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            # What is measured on validation data is not there.
            config.strict = False

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Averages gradients over ranks; those that are accumulated are the same on all ranks, and stay so."""
        if self._collective.world_size > 1:
            _average_gradients(pl_module, self._collective)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._done += 1
        total = int(trainer.num_training_batches) * int(trainer.max_epochs or 1)
        if self._clock is not None and (self._done % max(1, total // 200) == 0 or self._done == total):
            self._clock.tell(self._done, total, 0, 0)
        if math.isfinite(self._end) and self._collective.any(self._is_over(pl_module.device)):
            trainer.should_stop = True

    def _is_over(self, device: torch.device) -> bool:
        return time.perf_counter() > self._end


class TrainingTrial(TrainingBudget):
    """Stops after a few batches and says how many epochs there is time for.

    Args:
        end: when the time for all of training is over.
        collective: the ranks that train.
    """

    def __init__(self, end: float, collective: Collective) -> None:
        began = time.perf_counter()
        super().__init__(began + TRIAL * (end - began), collective)
        self._ends: list[float] = []
        self._epoch = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._epoch = int(trainer.num_training_batches)
        self._ends = [time.perf_counter()]

    def epochs(self, end: float) -> int:
        """Epochs that fit in the time from now on."""
        if len(self._ends) < 2:
            return 0
        started = self._ends[1] - self._ends[0]
        even = self._ends[WARM_UP:] if len(self._ends) > WARM_UP + 1 else self._ends
        batch = (even[-1] - even[0]) / (len(even) - 1)
        left = (end - time.perf_counter()) * (1 - RESERVE) - started
        return int(left / max(batch * self._epoch, 1e-9))

    def _is_over(self, device: torch.device) -> bool:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._ends.append(time.perf_counter())
        return len(self._ends) > WARM_UP + TIMED or super()._is_over(device)


@torch.no_grad()
def _average_gradients(model: pl.LightningModule, collective: Collective) -> None:
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
