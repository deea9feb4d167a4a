"""`RepairInTraining`, which repairs at chosen epochs of a training."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer, rank_zero_warn
from lightning_nrl._trainer.lightning.private_parts import CheckpointState, rerun_validation
from lightning_nrl._trainer.lightning.step_outputs import follow_hook, release_hook
from lightning_nrl._trainer.trainer_state import untracked
from lightning_nrl._utils.preserve import random_state
from lightning_nrl.callbacks.repair import RegressionFreeRepair
from lightning_nrl.errors import (
    ConfigurationError,
    TrainingWarning,
    check_choice,
    check_kind,
    check_real,
    check_whole,
)
from lightning_nrl.pipeline import Outcome
from lightning_nrl.report import RepairReport

HOOK = "on_train_epoch_end"  # hook of the module after which repairs run


class RepairInTraining(RegressionFreeRepair):
    """Repairs the model after chosen epochs and at the end of training.

    Training continues with the repaired weights, and may break samples again. Each repair works as
    in `RegressionFreeRepair`. It runs right after the module's own `on_train_epoch_end` and before
    callbacks that save or stop by a metric. Repairs leave the states of optimizers and schedules as
    they are. A repair writes its files to `<log_dir>/repair-step-<step>/` and logs under the name
    `repair-step-<step>`; for the repair at the end of training the name is `repair`.

    A repair by the default method may train for as many epochs as the model has been trained so
    far. Set a `max_time`, or choose a method that takes seconds (`convex`, `swarm`).

    Args:
        every_n_epochs: epochs between two repairs. If None, only `monitor` starts repairs.
        monitor: name of a validation metric, such as `regression/nfr`. An epoch ends with a repair
            if the metric is worse than its best value since the last repair. After an accepted
            repair, an unlogged validation measures the metric anew.
        mode: `min` if a lower metric is better, `max` if a higher one is.
        min_delta: by how much the metric may be worse than its best value without starting a
            repair. At least 0.
        at_end: if True, also repairs when training ends, unless a repair has already run after the
            last step.
        **arguments: arguments of `RegressionFreeRepair`.

    Attributes:
        report: the report of the last repair.
        reports: reports of all repairs of this training, the oldest first.

    Example::

        repair = RepairInTraining(every_n_epochs=5, monitor="regression/night/nfr", method="convex")
        metrics = RegressionMetrics("old.ckpt", slices="camera")
        Trainer(callbacks=[metrics, repair]).fit(model, datamodule=dm)
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        min_delta: float = 0.0,
        at_end: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        if every_n_epochs is None and monitor is None:
            raise ConfigurationError(
                "`every_n_epochs` and `monitor` are both None.",
                "give one of them, or take `RegressionFreeRepair`, which repairs when training "
                "ends.",
            )
        if every_n_epochs is not None:
            check_whole("every_n_epochs", every_n_epochs, 1)
        if monitor is not None:
            fits = isinstance(monitor, str) and bool(monitor)
            check_kind("monitor", monitor, fits, "name", "monitor='val_loss'")
        check_choice("mode", mode, ("min", "max"))
        check_real("min_delta", min_delta, "number", "give a number from 0.", least=0)
        self.every_n_epochs, self.at_end = every_n_epochs, at_end
        self.monitor, self.mode, self.min_delta = monitor, mode, min_delta
        self.reports: list[RepairReport] = []
        self._best: float | None = None
        self._last_step: int | None = None
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._best = None  # before a checkpoint is loaded, which may set it

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # It may be left from a training that ended without calling a hook.
        release_hook(pl_module, HOOK)
        self.reports, self._last_step, self._warned = [], None, False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning calls this hook before the module's hook of the same name, which may still
        # change weights.
        follow_hook(pl_module, HOOK, partial(self._repair_if_due, trainer, pl_module))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        release_hook(pl_module, HOOK)
        super().on_exception(trainer, pl_module, exception)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        return  # repairs within a training are not compared with what the module logs

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.at_end and self._last_step != trainer.global_step:
            super().on_train_end(trainer, pl_module)
        elif self._is_changed(pl_module):  # by training after the last repair
            self._accepted = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._last_step == trainer.global_step:
            super().teardown(trainer, pl_module, stage)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: CheckpointState
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._best is not None:
            states = checkpoint.setdefault("callbacks", {})
            states.setdefault(self.state_key, {})["best"] = self._best

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._best = state_dict.get("best")

    def _repair_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Metrics may differ between ranks; the first rank decides.
        if not trainer.strategy.broadcast(self._is_due(trainer)):
            return
        # `repaired.ckpt` must not store a metric of other weights.
        best, self._best = self._best, None
        name = f"repair-step-{trainer.global_step}"
        outcome = self.repair_now(trainer, pl_module, name=name)
        if outcome.parameters is not None:
            best = self._validated_again(trainer)
        self._best = best

    def repair_now(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        start_from: str = "last",
        name: str = "repair",
    ) -> Outcome:
        outcome = super().repair_now(trainer, pl_module, start_from, name)
        self._last_step = trainer.global_step
        assert self.report is not None
        self.reports.append(self.report)
        return outcome

    def _validated_again(self, trainer: Trainer) -> float | None:
        if self.monitor is None or not trainer.enable_validation:
            return None
        # All ranks validate or none does.
        if not trainer.strategy.broadcast(self.monitor in trainer.callback_metrics):
            return None
        with random_state(), untracked(trainer, kept=()):
            rerun_validation(trainer)
        value = float(trainer.callback_metrics.get(self.monitor, math.nan))
        return None if math.isnan(value) else value

    def _is_due(self, trainer: Trainer) -> bool:
        n, epochs = self.every_n_epochs, trainer.current_epoch + 1
        due = n is not None and epochs % n == 0
        if self.monitor is None:
            return due
        if self.monitor not in trainer.callback_metrics:
            if not self._warned and epochs % (trainer.check_val_every_n_epoch or 1) == 0:
                self._warned = True
                self._warn_of_missing_metric(trainer)
            return due
        sign = 1 if self.mode == "min" else -1
        value = sign * float(trainer.callback_metrics[self.monitor])
        if math.isnan(value):
            return due
        best = value if self._best is None else sign * self._best
        due |= value > best + self.min_delta
        # After a refused repair, later values are compared with the value that started the repair.
        self._best = sign * (value if due else min(best, value))
        return due

    def _warn_of_missing_metric(self, trainer: Trainer) -> None:
        metrics = sorted(trainer.callback_metrics)
        rank_zero_warn(
            TrainingWarning(
                f"`monitor={self.monitor!r}`: no metric of that name was logged, "
                "so it triggers no repair.",
                f"the logged metrics are {metrics}; log it in `validation_step`.",
            )
        )
