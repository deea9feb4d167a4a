"""`TrainingHistory`, which records results of samples and weights of layers at every epoch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer
from lightning_nrl._trainer.lightning.private_parts import batch_limit
from lightning_nrl._trainer.output.folders import base_folder
from lightning_nrl._trainer.reading.data_splits import SplitLoaders, find_splits, run_splits
from lightning_nrl._trainer.reading.loaders import check_data
from lightning_nrl._trainer.tracking.loggers import track_figures, track_numbers
from lightning_nrl._trainer.tracking.tags import parse_prefix
from lightning_nrl._utils.distributed import Collective
from lightning_nrl.callbacks.data_callback import DataCallback
from lightning_nrl.data import Adapter
from lightning_nrl.errors import ConfigurationError, FilesWarning, check_whole
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.evaluation.layers import find_layers
from lightning_nrl.published.learning_curves import Learning, record_figures
from lightning_nrl.published.training_record import TrainingRecord, forget_after, write_point
from lightning_nrl.tasks import Task


class TrainingHistory(DataCallback):
    """Records in every epoch which samples are right, their losses, and the weights of some layers.

    `NeuRecover` localises with this history, and `TrainingRecord.read(folder)` reads it. A resumed
    training continues its history. Each record takes one pass over all splits in evaluation mode.
    Record less often (`every_n_epochs=5`) if that is too slow. The training itself does not change.

    Each record logs three counts per split, such as `val`: `history/val/learned` (samples that are
    right), `forgotten` (wrong, but right at an earlier record) and `never_learned` (wrong at all
    records so far). If there are at most 20 classes, each class is counted too:
    `history_val/forgotten/3`. At the end, TensorBoard gets a figure of each split.

    Args:
        splits: `train`, `val`, `val:1`, `repair`, `test` or several. `auto` takes training and
            validation data.
        every_n_epochs: epochs between two records.
        every_n_steps: optimiser steps between two records. If given, `every_n_epochs` is ignored.
        layers: layers to record: `auto` (the layer that a repair would search), dotted names, or
            `all`.
        dirpath: folder for records. None takes `<log_dir>/history` or, without a logger,
            `<default_root_dir>/history`.
        prefix: prefix of logged tags.
        task: as in `RegressionFreeRepair`.
        adapter: as in `DataOptions`.
        output: as in `DataOptions`.

    Attributes:
        folder: folder with the records. None before training.
        recorded: names of the recorded splits. Empty before training.
        seconds: time spent on the records of this training.

    Example::

        callbacks = [TrainingHistory(), RegressionFreeRepair(method="neurecover")]
        Trainer(callbacks=callbacks).fit(model, datamodule=dm)
    """

    def __init__(
        self,
        splits: str | Sequence[str] = "auto",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        layers: str | list[str] = "auto",
        dirpath: str | Path | None = None,
        prefix: str = "history",
        task: str | Task | None = None,
        adapter: str | Adapter | None = None,
        output: int | str | None = None,
    ) -> None:
        super().__init__(task, adapter, output)
        self.splits = (splits,) if isinstance(splits, str) else tuple(splits)
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ConfigurationError(
                f"`splits={splits!r}` names no split, or one twice.", "name each split once."
            )
        for split in self.splits:
            if self.splits != ("auto",):
                check_data("splits", split)
        check_whole("every_n_epochs", every_n_epochs, 1)
        if every_n_steps is not None:
            check_whole("every_n_steps", every_n_steps, 1)
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.layers = layers
        self.dirpath = dirpath
        self.prefix = parse_prefix(prefix, "history")
        self.folder: Path | None = None
        self.recorded: tuple[str, ...] = ()
        self._resumed: str | None = None
        self.seconds = 0.0
        self._last: int | None = None
        self._ever_right: dict[str, Tensor] = {}  # by split, samples that were right at some record

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._layer_names(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = base_folder(self.dirpath, trainer, "history")
        if self.dirpath is None and self._resumed is not None and trainer.global_step:
            folder = Path(self._resumed)
        self.folder = folder
        self.seconds = 0.0
        self._last = None
        self._ever_right = {}
        self.recorded = find_splits(self.splits, SplitLoaders(trainer, pl_module))

        def read_earlier_record() -> None:
            if trainer.is_global_zero:
                forget_after(folder, trainer.global_step or -1)
                if _has_points(folder):
                    for name, split in TrainingRecord.read(folder).splits.items():
                        self._ever_right[name] = ~split.never_learned

        Collective.current(pl_module.device).all_or_none(
            read_earlier_record,
            "the record of an earlier training could not be read on another rank.",
        )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        n = self.every_n_steps
        if n is not None and trainer.global_step % n == 0 and trainer.global_step != self._last:
            self.record(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.record(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or self.folder is None or find_spec("matplotlib") is None:
            return
        if _has_points(self.folder):
            track_figures(
                record_figures(TrainingRecord.read(self.folder)),
                trainer.loggers,
                step=trainer.global_step,
                name=self.prefix,
                what="history of the training",
            )

    def state_dict(self) -> dict[str, Any]:
        return {} if self.folder is None else {"folder": str(self.folder.absolute())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get("folder")

    def record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates `recorded` splits and writes a record. All ranks must call it.

        Restores modes and random states.
        """
        began = time.perf_counter()
        step = trainer.global_step
        results = run_splits(self.recorded, trainer, pl_module, self.task, self.adapter)
        self._last = step
        if trainer.is_global_zero and self.folder is not None:
            if not batch_limit(trainer):
                parameters = dict(pl_module.named_parameters())
                weights = {name: parameters[name] for name in self._layer_names(pl_module)}
                try:
                    write_point(self.folder, step, trainer.current_epoch, results, weights)
                except OSError as error:
                    warnings.warn(
                        FilesWarning(
                            f"`TrainingHistory` could not write step {step:,} of its record: "
                            f"{error}.",
                            "free some space, or give another `dirpath`; training continues and "
                            "tries later steps.",
                        ),
                        stacklevel=2,
                    )
            numbers = self._learning_numbers(results)
            track_numbers(numbers, trainer.loggers, step=step, what="history of the training")
        self.seconds += time.perf_counter() - began

    def _layer_names(self, model: LightningModule) -> list[str]:
        if self.layers == "all":
            return [name for name, _ in model.named_parameters()]
        return list(find_layers(model, self.layers, include_bias=True).parameters)

    def _learning_numbers(self, results: SampleResults) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for split in results.splits:
            rows = results.of(split)
            right = results.passed[rows]
            self._ever_right[split] = right | self._ever_right.get(split, right)
            numbers |= Learning(results.label[rows], right, self._ever_right[split]).numbers(
                self.prefix, split
            )
        return numbers


def _has_points(folder: Path) -> bool:
    return any(folder.glob("point-*.pt"))
