"""What a training does to each sample: right or wrong and its loss at every epoch, with the weights of some layers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_nrl._lightning import (
    CallbackBase,
    LightningModule,
    Trainer,
    averaging_callbacks,
    batch_limit,
    callbacks_of,
    rank_zero_warn,
    validating,
)
from lightning_nrl._model.layers import find_layers
from lightning_nrl._tracking import Learning, track_history
from lightning_nrl._trainer.artifacts import base_folder, parse_prefix
from lightning_nrl._trainer.batch_order import OrderObserver, Positions
from lightning_nrl._trainer.data_splits import SplitLoaders
from lightning_nrl._trainer.forward_record import ForwardRecorder, SampleTally
from lightning_nrl._trainer.loaders import (
    check_data,
    check_loader,
    make_source,
    parse_adapter,
    sample_index,
    split_and_loader,
)
from lightning_nrl._trainer.reference_validation import batches_in_order, validation_loader
from lightning_nrl._trainer.trainer_checks import check_packages, check_strategy
from lightning_nrl._trainer.trainer_state import make_evaluator
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import preserve, random_state
from lightning_nrl._utils.state import State
from lightning_nrl.data.batch import Adapter
from lightning_nrl.errors import (
    ConfigurationError,
    DataWarning,
    FilesWarning,
    PerformanceWarning,
    check_kind,
    check_whole,
)
from lightning_nrl.localization.training_record import (
    SplitPoint,
    TrainingRecord,
    forget_after,
    split_points,
    write_point,
)
from lightning_nrl.tasks import Task, parse_task

__all__ = ["TrainingHistory"]

OWN_SPLITS = ("repair", "test")
"""Which a training does not run over."""


class TrainingHistory(CallbackBase):
    """Records in every epoch which samples are right, their losses, and the weights of some layers, in a folder.

    `NeuRecover` localises by it, forgetting curves go to the loggers, `TrainingRecord.read(folder)` gives all of it.
    Every sample is recorded once, whatever the number of ranks, and a training that is resumed goes on with its record.

    Training and validation data are taken down from the forward passes that the trainer makes anyway. What that says of
    a training sample is how it was met in the epoch: in training mode, with its augmentation, by the weights before the
    step of its batch. Samples that an epoch leaves out are not known at that point. Of validation data it is what the
    model with the weights of the point does, if the trainer has validated at that step. All other data take a pass of
    their own in evaluation mode, and so do training and validation data where the passes of the trainer cannot be
    listened to, which is warned of.

    It logs, by split, `history/val/learned` (right now), `forgotten` (right at an earlier record, wrong now) and
    `never_learned` (never right so far); with up to 20 classes also for each, as `history_val/forgotten/3`. At the end
    of the training TensorBoard gets a figure of each split.

    Args:
        splits: `train`, `val`, `val:1`, `repair`, `test` or several of them; `auto`: training and validation data,
            those that are there.
        every_n_epochs: epochs between two records.
        every_n_steps: optimiser steps between two records instead; of training data each has the samples that were
            trained on since the one before.
        layers: whose weights are kept: `auto` (the layer that a repair would take), dotted names, or `all`.
        own_pass: has each record run the model once over all splits, in evaluation mode, with the weights of the point.
        dirpath: the folder; None: `<log_dir>/history`, or `<default_root_dir>/history` without a logger.
        prefix: what tags begin with.
        task: what passed and loss mean, a name or an object of `lightning_nrl.tasks`; None: multiclass classification.
        adapter: as for `DataOptions`.

    Attributes:
        folder: where the record is, once training has begun.
        seconds: what records and what is done in each batch have taken in this training.
        recorded: the splits of this training, once it has begun.

    Raises:
        ConfigurationError: an argument that cannot be used; before the first step.

    Example::

        history = TrainingHistory()
        Trainer(callbacks=[history, RegressionFreeRepair(method="neurecover")]).fit(model, datamodule=dm)
    """

    def __init__(
        self,
        splits: str | Sequence[str] = "auto",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        layers: str | list[str] = "auto",
        own_pass: bool = False,
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
            if self.splits != ("auto",):
                check_data("splits", split)
        check_whole("every_n_epochs", every_n_epochs, 1)
        if every_n_steps is not None:
            check_whole("every_n_steps", every_n_steps, 1)
        check_kind("own_pass", own_pass, isinstance(own_pass, bool), "bool", "own_pass=True")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.layers = layers
        self.own_pass = own_pass
        self.dirpath = dirpath
        self.prefix = parse_prefix(prefix, "history")
        self.task = parse_task(task)
        self.adapter = parse_adapter(adapter)
        self.folder: Path | None = None
        self.seconds = 0.0
        self.recorded: tuple[str, ...] = ()
        self._resumed: str | None = None
        self._order = OrderObserver()
        self._recorder = ForwardRecorder(self.task, self.adapter)
        self._forget()

    def _forget(self) -> None:
        self._last: int | None = None
        self._learning: dict[str, Learning] = {}
        self._tallies: dict[str, SampleTally] = {}
        self._why_not: dict[str, str] = {}
        self._own: set[str] = set()  # splits that need a pass of their own, the same on every rank
        self._validated: dict[str, int] = {}  # the step at which each split was validated last
        self._batches: dict[str, tuple[Any, list[Positions]]] = {}  # of each validated loader
        self._positions: Positions | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_packages(trainer)
        if stage == "fit":
            check_strategy(trainer, "which are needed whole", "train with a single device or with ddp.")
            self._names(pl_module)
            self._release()
            if not self.own_pass:
                self._recorder.attach(pl_module)
                if self.splits == ("auto",) or "train" in self.splits:
                    self._order.begin(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._order.on_train_start(trainer)
        folder = base_folder(self.dirpath, trainer, "history")
        if self.dirpath is None and self._resumed is not None and trainer.global_step:
            folder = Path(self._resumed)
        self.folder, self.seconds = folder, 0.0
        self._forget()
        indices = self._find_splits(SplitLoaders(trainer, pl_module))
        self.recorded = tuple(indices)

        def earlier() -> None:
            if trainer.is_global_zero:
                forget_after(folder, trainer.global_step if trainer.global_step else -1)
                if any(folder.glob("point-*.pt")):
                    found = TrainingRecord.read(folder).splits
                    self._learning = {split: Learning.of(record) for split, record in found.items()}

        failed = "the record of an earlier training could not be read on another rank."
        Collective.current(pl_module.device).all_or_none(earlier, failed)
        self._own = {split for split in self.recorded if self.own_pass or split_and_loader(split)[0] in OWN_SPLITS}
        self._tallies = {split: SampleTally(self.task, index) for split, index in indices.items()}

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._listens("train"):
            self._order.on_epoch_start(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._listens("train"):
            return
        began = time.perf_counter()
        positions = self._order.on_batch_start(batch_idx)
        wanted = self.every_n_steps is not None or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self._positions = positions if wanted else None
        if wanted:
            unknown = "the samples of its batches are not known"
            why_not = self._order.why_not() or (unknown if positions is None else "")
            self._give_up("train", why_not or self._recorder.begin(trainer, pl_module, batch))
        self.seconds += time.perf_counter() - began

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._positions is not None and self._listens("train"):
            self._take("train", trainer, pl_module, batch, self._positions)
            self._positions = None
        n = self.every_n_steps
        if n is not None and trainer.global_step % n == 0 and trainer.global_step != self._last:
            self.record(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.record(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        for split in self.recorded:
            which = split_and_loader(split)[1] or "0"
            if not split.startswith("val") or not self._listens(split):
                continue
            if any(isinstance(one, averaging_callbacks()) for one in callbacks_of(trainer)):
                self._give_up(split, "a callback may validate other weights than those that are trained")
                continue
            try:
                loader, most = validation_loader(trainer, int(which))
                if split not in self._batches or self._batches[split][0] is not loader:
                    with random_state():
                        order = [np.array(batch, dtype=np.int64) for batch in batches_in_order(loader, most)]
                    self._batches[split] = loader, order
            except (ConfigurationError, ValueError) as error:
                self._give_up(split, str(error).partition("\n")[0].rstrip("."))
            # What an earlier validation found is of other weights.
            self._tallies[split] = SampleTally(self.task, self._tallies[split].index)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        split = self._validated_split(trainer, dataloader_idx)
        if split is not None:
            self._give_up(split, self._recorder.begin(trainer, pl_module, batch))

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
        split = self._validated_split(trainer, dataloader_idx)
        if split is not None:
            order = self._batches[split][1]
            positions = order[batch_idx] if batch_idx < len(order) else np.zeros(0, np.int64)
            self._take(split, trainer, pl_module, batch, positions)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated |= dict.fromkeys(self._batches, trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        if trainer.is_global_zero and self.folder is not None and any(self.folder.glob("point-*.pt")):
            record = TrainingRecord.read(self.folder)
            track_history(record, trainer.loggers, step=trainer.global_step, name=self.prefix)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.folder is None else {"folder": str(self.folder.absolute())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get("folder")

    def record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes a point of what was listened to, the model running once over the other splits.

        Modes and random states are left as found. To be called on all ranks.
        """
        began = time.perf_counter()
        ranks = Collective.current(pl_module.device)
        self._agree(ranks)
        found = {
            split: self._tallies[split].point(ranks, "training" if split == "train" else "validation")
            for split in self.recorded
            if split not in self._own and (split == "train" or self._validated.get(split) == trainer.global_step)
        }
        own = [split for split in self.recorded if split not in found]
        if own:
            found |= self._run(trainer, pl_module, own)
        self._last = trainer.global_step
        if trainer.is_global_zero and self.folder is not None:
            points = {split: found[split] for split in self.recorded}
            if not batch_limit(trainer):
                weights = self._weights(pl_module)
                try:
                    write_point(self.folder, trainer.global_step, trainer.current_epoch, points, weights)
                except OSError as error:
                    problem = f"`TrainingHistory` could not write step {trainer.global_step:,} of its record: {error}."
                    hint = "make room, or give it another `dirpath`; the training goes on, and later steps are tried."
                    warnings.warn(FilesWarning(problem, hint), stacklevel=2)
            numbers = self._learned(points)
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
        self.seconds += time.perf_counter() - began

    def _find_splits(self, loaders: SplitLoaders) -> dict[str, Tensor]:
        """Positions in the data set of the samples of each split that is to be recorded."""
        if self.splits != ("auto",):
            return {split: sample_index(check_loader(loaders.get(split), split)) for split in self.splits}
        found: dict[str, Tensor] = {}
        for name in ("train", "val"):
            given = loaders.get(name)
            several = len(given) if isinstance(given, (list, tuple)) else 1
            for split in [name] if several == 1 else [f"{name}:{i}" for i in range(several)]:
                if given is not None:
                    try:
                        found[split] = sample_index(check_loader(loaders.get(split), split))
                    except ConfigurationError as error:
                        problem, _, hint = str(error).partition("\nHINT: ")
                        rank_zero_warn(DataWarning(f"`TrainingHistory` does not record {problem}", hint))
        if not found:
            hint = "name data that can be read by index: `splits='repair'`."
            raise ConfigurationError("`splits='auto'`: no training or validation data can be recorded.", hint)
        return found

    def _run(self, trainer: Trainer, pl_module: LightningModule, splits: Sequence[str]) -> dict[str, SplitPoint]:
        limit = batch_limit(trainer)
        with random_state(), validating(trainer), torch.no_grad(), preserve(pl_module):
            pl_module.eval()
            loaders = SplitLoaders(trainer, pl_module)
            how: dict[str, Any] = {"trainer": trainer, "model": pl_module, "adapter": self.adapter, "limit": limit}
            sources = [make_source(loaders.get(split), split, **how) for split in splits]
            return split_points(make_evaluator(trainer, pl_module, self.task).run(sources))

    def _listens(self, split: str) -> bool:
        return split in self.recorded and split not in self._own and split not in self._why_not

    def _validated_split(self, trainer: Trainer, dataloader_idx: int) -> str | None:
        """The split of a loader that is validated, if it is listened to."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return None
        names = ("val", f"val:{dataloader_idx}") if dataloader_idx == 0 else (f"val:{dataloader_idx}",)
        return next((one for one in names if self._listens(one) and one in self._batches), None)

    def _take(self, split: str, trainer: Trainer, pl_module: LightningModule, batch: Any, positions: Positions) -> None:
        began = time.perf_counter()
        self._give_up(split, self._recorder.end(trainer, pl_module, batch, positions, self._tallies[split]))
        self.seconds += time.perf_counter() - began

    def _give_up(self, split: str, why_not: str) -> None:
        if why_not:
            self._why_not.setdefault(split, why_not)

    def _agree(self, ranks: Collective) -> None:
        """Splits that one rank cannot listen to take a pass of their own on all."""
        for split in self.recorded:
            if split not in self._own and (why_not := ranks.first_text(self._why_not.get(split, ""))):
                self._own.add(split)
                problem = f"`TrainingHistory` makes a pass of its own over `{split}` data at every record: {why_not}."
                hint = "record less often (`every_n_epochs=5`), or call `self(x)` once in the step."
                rank_zero_warn(PerformanceWarning(problem, hint))

    def _release(self) -> None:
        self._order.close()
        self._recorder.detach()

    def _names(self, model: LightningModule) -> list[str]:
        """Parameters to be kept."""
        if self.layers == "all":
            return [name for name, _ in model.named_parameters()]
        return list(find_layers(model, self.layers, include_bias=True).parameters)

    def _weights(self, model: LightningModule) -> State:
        parameters = dict(model.named_parameters())
        return {name: parameters[name] for name in self._names(model)}

    def _learned(self, points: dict[str, SplitPoint]) -> dict[str, float]:
        """Counts after this record by tag."""
        numbers: dict[str, float] = {}
        for split, point in points.items():
            before = self._learning.get(split, Learning.none(len(point.index)))
            other = point.known & before.seen & (before.label != point.label)
            if bool(other.any()):
                problem = f"`{split}` data: {int(other.sum())} samples have other labels than at the record before"
                hint = "where batches mix samples or draw labels, record them by `own_pass=True`."
                rank_zero_warn(DataWarning(f"{problem}.", hint))
            self._learning[split] = before.after(point)
            numbers |= self._learning[split].numbers(self.prefix, split)
        return numbers
