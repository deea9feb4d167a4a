"""Work on a trained LightningModule and its data inside a fit that makes no step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import override

from lightning_nrl._trainer.lightning.packages import CallbackBase, LightningModule, Trainer
from lightning_nrl._trainer.lightning.private_parts import callbacks_of, starts_own_processes
from lightning_nrl._trainer.trainer_checks import check_packages, check_strategy
from lightning_nrl._trainer.trainer_repair import TrainedModel
from lightning_nrl._trainer.trainer_state import ASSUMED_EPOCHS, borrowed, epochs_of, epochs_saved, untracked
from lightning_nrl.callbacks.repair import RegressionFreeRepair, RepairCallback
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.pipeline.repair_module import Outcome

Result = TypeVar("Result")
Work = Callable[[Trainer, LightningModule, int], Outcome | None]  # with the epochs that the model was trained for


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
    """Returns the result of work that changes nothing: model, trainer and random state stay as they are.

    `callback` says which data, task and seed are meant; `data` are arguments of `fit`, of which each rank reads all if
    `whole`.
    """
    check_packages(trainer, model=model, datamodule=data["datamodule"])
    if starts_own_processes(trainer):
        problem = f"{type(trainer.strategy).__name__} starts processes of its own, and results stay in them."
        raise ConfigurationError(f"`strategy`: {problem}", "use one device, or `strategy='ddp'`.")
    results: list[Result] = []

    def inside(trainer: Trainer, module: LightningModule, epochs: int) -> None:
        with callback.repair.opened(trainer, module, epochs, whole=whole) as trained:
            results.append(work(trained))

    with untracked(trainer), without_training(trainer, callback, inside, weights_only):
        trainer.fit(model, ckpt_path=ckpt_path, **data)
    return results[0]


@contextmanager
def without_training(
    trainer: Trainer, callback: RegressionFreeRepair, work: Work, weights_only: bool = True
) -> Iterator[None]:
    """Turns a `fit` into work on the model without a step; an outcome of it is saved, logged and written."""
    own = next((c for c in callbacks_of(trainer) if isinstance(c, RepairCallback)), None)
    if own is not None:
        hint = "use a trainer without it, or call `fit`."
        raise ConfigurationError(f"`trainer` has a {type(own).__name__} of its own.", hint)
    if trainer.min_epochs or (trainer.min_steps or 0) > 0:
        problem = "`trainer` has `min_epochs` or `min_steps`, which make it train."
        raise ConfigurationError(problem, "use a trainer without a minimum of training.")
    check_strategy(trainer)
    inside = _WithoutTraining(callback, work, trainer)
    with warnings.catch_warnings(), borrowed(trainer, inside, weights_only=weights_only):
        ignored = (
            "The number of training batches|`max_epochs` was not set|Be aware that when using `ckpt_path`, callbacks"
        )
        warnings.filterwarnings("ignore", ignored)
        yield


class _WithoutTraining(CallbackBase):
    """Works at the start of a fit and stops it before its first step."""

    def __init__(self, callback: RegressionFreeRepair, work: Work, trainer: Trainer) -> None:
        self.callback = callback
        self.work = work
        self.outcome: Outcome | None = None
        # The trainer knows how long it trained a module before; a checkpoint that is loaded knows better.
        fitted = trainer.fit_loop.epoch_progress.current.ready > 0
        self._fitted = trainer.lightning_module if fitted else None
        self._epochs = epochs_of(trainer) if fitted else ASSUMED_EPOCHS
        self._saved: int | None = None

    @property
    def state_key(self) -> str:
        return self.callback.state_key

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = epochs_saved(checkpoint)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Without a limit, a checkpoint may have any number of epochs. Before, optimizers were configured, and schedules
        # may have asked how long training is.
        trainer.fit_loop.max_epochs = -1
        self.callback.on_fit_start(trainer, pl_module)
        self.callback.on_train_start(trainer, pl_module)
        fitted = self._epochs if pl_module is self._fitted else ASSUMED_EPOCHS
        with self.callback.heeding_signals(trainer):
            self.outcome = self.work(trainer, pl_module, fitted if self._saved is None else self._saved)
        trainer.should_stop = True

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves only now, since optimizer states and the true step count are loaded after `on_fit_start`."""
        if self.outcome is not None:
            with self.callback.heeding_signals(trainer):
                name = self.callback.save(trainer, pl_module, self.outcome)
            self.callback.announce(trainer, self.outcome, name)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.callback.on_save_checkpoint(trainer, pl_module, checkpoint)
