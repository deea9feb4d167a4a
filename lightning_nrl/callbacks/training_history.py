"""What a training does to each sample: right or wrong and its loss at every epoch, with the weights of some layers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nrl._lightning import CallbackBase, LightningModule, Trainer, batch_limit, validating
from lightning_nrl._model.layers import find_layers
from lightning_nrl._trainer.artifacts import base_folder, parse_prefix
from lightning_nrl._trainer.data_splits import SplitLoaders
from lightning_nrl._trainer.loaders import check_data, make_source, parse_adapter
from lightning_nrl._trainer.trainer_checks import check_packages, check_strategy
from lightning_nrl._trainer.trainer_state import make_evaluator
from lightning_nrl._utils.preserve import preserve, random_state
from lightning_nrl._utils.state import State
from lightning_nrl.data.batch import Adapter
from lightning_nrl.errors import ConfigurationError, check_whole
from lightning_nrl.evaluation import SampleResults
from lightning_nrl.localization.training_record import TrainingRecord, forget_after, write_point
from lightning_nrl.tasks import Task, parse_task

__all__ = ["TrainingHistory"]

MOST_CLASSES = 20
"""Classes up to which curves are logged for each."""


class TrainingHistory(CallbackBase):
    """Records in every epoch which samples are right, their losses, and the weights of some layers, in a folder.

    `NeuRecover` localises by it, forgetting curves go to the loggers, `TrainingRecord.read(folder)` gives all of it.
    Each record is a pass of its own over the splits, in evaluation mode, every sample counted exactly once, whatever
    the number of ranks. A training that is resumed goes on with its record.

    It logs, by split, as `history/val/...`: `learned` (right now), `forgotten` (right at an earlier record, wrong now)
    and `never_learned` (never right so far); with up to 20 classes also for each, as `history/val/forgotten/3`.

    Args:
        splits: `val`, `train`, `repair` or several of them.
        every_n_epochs: epochs between two records.
        every_n_steps: optimiser steps between two records instead.
        layers: whose weights are kept: `auto` (the layer that a repair would take), dotted names, or `all`.
        dirpath: the folder; None: `<log_dir>/history`, or `<default_root_dir>/history` without a logger.
        prefix: what tags begin with.
        task: what passed and loss mean, a name or an object of `lightning_nrl.tasks`; None: multiclass classification.
        adapter: as for `DataOptions`.

    Attributes:
        folder: where the record is, once training has begun.
        seconds: what all records of this training have taken.

    Raises:
        ConfigurationError: an argument that cannot be used; before the first step.

    Example::

        history = TrainingHistory(splits=["train", "val"])
        Trainer(callbacks=[history, RegressionFreeRepair(method="neurecover")]).fit(model, datamodule=dm)
    """

    def __init__(
        self,
        splits: str | Sequence[str] = "val",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        layers: str | list[str] = "auto",
        dirpath: str | Path | None = None,
        prefix: str = "history",
        task: str | Task | None = None,
        adapter: str | Adapter | None = None,
    ) -> None:
        super().__init__()
        self.splits = (splits,) if isinstance(splits, str) else tuple(splits)
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ConfigurationError(f"`splits={splits!r}` names no split, or one twice.", "name each once.")
        for split in self.splits:
            check_data("splits", split)
        check_whole("every_n_epochs", every_n_epochs, 1)
        if every_n_steps is not None:
            check_whole("every_n_steps", every_n_steps, 1)
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.layers = layers
        self.dirpath = dirpath
        self.prefix = parse_prefix(prefix, "history")
        self.task = parse_task(task)
        self.adapter = parse_adapter(adapter)
        self.folder: Path | None = None
        self.seconds = 0.0
        self._resumed: str | None = None
        self._last: int | None = None
        self._was_right: dict[str, Tensor] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_packages(trainer)
        if stage == "fit":
            check_strategy(trainer, "which are needed whole", "train with a single device or with ddp.")
            self._names(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = base_folder(self.dirpath, trainer, "history")
        if self.dirpath is None and self._resumed is not None and trainer.global_step:
            folder = Path(self._resumed)
        self.folder, self.seconds, self._last, self._was_right = folder, 0.0, None, {}
        if trainer.is_global_zero:
            forget_after(folder, trainer.global_step if trainer.global_step else -1)
            if any(folder.glob("point-*.pt")):
                record = TrainingRecord.read(folder)
                self._was_right = {split: found.passed.any(0) for split, found in record.splits.items()}
        trainer.strategy.barrier("history")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        n = self.every_n_steps
        if n is not None and trainer.global_step % n == 0 and trainer.global_step != self._last:
            self.record(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.record(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.folder is None else {"folder": str(self.folder.absolute())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get("folder")

    def record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs the model once over the splits and writes a point; modes and random states are left as found."""
        began = time.perf_counter()
        limit = batch_limit(trainer)
        with random_state(), validating(trainer), torch.no_grad(), preserve(pl_module):
            pl_module.eval()
            loaders = SplitLoaders(trainer, pl_module)
            sources = [
                make_source(
                    loaders.get(split), split, trainer=trainer, model=pl_module, adapter=self.adapter, limit=limit
                )
                for split in self.splits
            ]
            results = make_evaluator(trainer, pl_module, self.task).run(sources)
        self._last = trainer.global_step
        if trainer.is_global_zero and self.folder is not None:
            if not limit:
                weights = self._weights(pl_module)
                write_point(self.folder, trainer.global_step, trainer.current_epoch, results, weights)
            numbers = self._curves(results)
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
        self.seconds += time.perf_counter() - began

    def _names(self, model: LightningModule) -> list[str]:
        """Parameters to be kept."""
        if self.layers == "all":
            return [name for name, _ in model.named_parameters()]
        return list(find_layers(model, self.layers, include_bias=True).parameters)

    def _weights(self, model: LightningModule) -> State:
        parameters = dict(model.named_parameters())
        return {name: parameters[name] for name in self._names(model)}

    def _curves(self, results: SampleResults) -> dict[str, float]:
        """Counts of this record for each split and class, and a look at what was right before."""
        numbers = {}
        for split in results.splits:
            own = results.of(split)
            passed, label = results.passed[own], results.label[own]
            was_right = self._was_right.get(split, torch.zeros_like(passed))
            found = {"learned": passed, "forgotten": was_right & ~passed, "never_learned": ~was_right & ~passed}
            self._was_right[split] = was_right | passed
            classes = label.unique().tolist()
            for name, mask in found.items():
                numbers[f"{self.prefix}/{split}/{name}"] = float(mask.sum())
                for one in classes if 1 < len(classes) <= MOST_CLASSES else ():
                    numbers[f"{self.prefix}/{split}/{name}/{one}"] = float(mask[label == one].sum())
        return numbers
