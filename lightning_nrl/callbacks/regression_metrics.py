"""Counts of a new model against the model that it is to replace, in every validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_nrl._trainer import validation_flips
from lightning_nrl._trainer.lightning.packages import CallbackBase, LightningModule, Trainer, rank_zero_warn
from lightning_nrl._trainer.loaders import parse_adapter
from lightning_nrl._trainer.repair_files import parse_prefix
from lightning_nrl._trainer.step_outputs import OutputCapture, logits_of
from lightning_nrl._trainer.trainer_checks import check_packages, check_strategy
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import random_state
from lightning_nrl._utils.state import State
from lightning_nrl.data.batch import Adapter, ModelCall, run_model
from lightning_nrl.data.columns import find_column
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import PerformanceWarning, check_whole
from lightning_nrl.tasks import Task, parse_task
from lightning_nrl.updates.old_model import Reference
from lightning_nrl.updates.release import check_reference


class RegressionMetrics(CallbackBase):
    """Logs in every validation what the new model breaks and repairs of what the replaced one does.

    It logs `regression/nfr`, `pfr`, `relative_nfr`, `btc`, `bec`, `broken`, `repaired`, `accuracy` and
    `reference_accuracy`, where `ModelCheckpoint` and `EarlyStopping` find them. The model's outputs are those that its
    own `validation_step` makes: no second pass over the data. The replaced model makes one pass, before training.

    Args:
        reference: the replaced model: a module, the path of its checkpoint or of its predictions (CSV, split `val`), or
            an `OldModel`.
        slices: counts slices too, as `regression/<slice>/nfr` and so on: a column of the raw batch by its key or place,
            or a function of it or its address, with a name or number for each sample, or one bool (the slice has the
            column's name); or a `Target`.
        prefix: of tags.
        dataloader: which validation data loader is counted, where there are several.
        task: as of `RegressionFreeRepair`.
        adapter: as of `DataOptions`.

    Example::

        metrics = RegressionMetrics("old.ckpt")
        best = ModelCheckpoint(monitor="regression/nfr")
        Trainer(callbacks=[metrics, best]).fit(new_model, datamodule=dm)
    """

    def __init__(
        self,
        reference: nn.Module | str | Path | State | Reference,
        slices: str | int | Callable[[Any], Any] | Target | None = None,
        prefix: str = "regression",
        dataloader: int = 0,
        task: str | Task | None = None,
        adapter: str | Adapter | None = None,
    ) -> None:
        super().__init__()
        self.reference = check_reference("reference", reference)
        self.slices: Any = None if slices is None else find_column("slices", slices)
        self.prefix = parse_prefix(prefix, "regression")
        check_whole("dataloader", dataloader, 0)
        self.dataloader = dataloader
        self.task = parse_task(task)
        self.adapter = parse_adapter(adapter)
        self._outputs = OutputCapture()
        self._reference_results: validation_flips.ReferenceResults | None = None
        self._counter: validation_flips.FlipCounter | None = None
        self._warned = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_packages(trainer)
        check_strategy(trainer, "which are needed whole", "train with a single device or with ddp.")
        if stage in ("fit", "validate"):
            self._reset()
            self._outputs.attach(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._reset()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._reset()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.limit_val_batches != 0:
            self._evaluate_reference(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        known = self._reference_results
        # Data loaders may be made anew while training.
        if known is None or not validation_flips.is_same_validation(known, trainer, self.dataloader):
            known = self._evaluate_reference(trainer, pl_module)
        self._counter = validation_flips.FlipCounter(known, pl_module.device)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._counter is not None and dataloader_idx == self.dataloader:
            self._outputs.begin()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._counter is None or dataloader_idx != self.dataloader:
            return
        assert self._reference_results is not None
        args, kwargs, target = self._reference_results.adapter(batch)
        output = self._outputs.end(args, kwargs, redirected=trainer.strategy.model is not pl_module)
        is_forward = not (args and isinstance(args[0], ModelCall))
        logits = logits_of(output, self._counter.size(batch_idx), self.task) if is_forward else None
        if logits is None:
            if is_forward and not self._warned:
                self._warned = True
                problem = (
                    "`validation_step` does not call the whole model on a whole batch, which costs one more pass each."
                )
                rank_zero_warn(PerformanceWarning(problem, "call `self(x)` in `validation_step`."))
            with random_state(), trainer.precision_plugin.forward_context():
                logits = self.task.logits(run_model(pl_module, args, kwargs))
        right = self.task.right(logits, target)
        self._counter.add(batch_idx, right, self.task.label(target))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._counter is None:
            return
        names, counts = self._counter.counts(Collective.current(pl_module.device))
        self._counter = None
        tags = (self.prefix, *(f"{self.prefix}/{name}" for name in names))
        rows = zip(tags, validation_flips.metrics_of(counts), strict=True)
        found = {f"{tag}/{key}": value for tag, values in rows for key, value in values.items()}
        # The counts are the same on every rank; `sync_dist` keeps Lightning from doubting it.
        pl_module.log_dict(found, sync_dist=trainer.world_size > 1, add_dataloader_idx=False)

    def _evaluate_reference(self, trainer: Trainer, pl_module: LightningModule) -> validation_flips.ReferenceResults:
        how = {"dataloader": self.dataloader, "slices": self.slices, "task": self.task, "adapter": self.adapter}
        known = self._reference_results = validation_flips.evaluate_reference(self.reference, trainer, pl_module, **how)
        self._outputs.attach(pl_module, known.parts)
        return known

    def _reset(self) -> None:
        self._outputs.detach()
        self._reference_results = self._counter = None
        self._warned = False
