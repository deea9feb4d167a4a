"""The passes that a trainer makes over training and validation data anyway, listened to split by split."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lightning_nrl._lightning import LightningModule, Trainer, averaging_callbacks, callbacks_of, rank_zero_warn
from lightning_nrl._trainer.batch_order import OrderObserver, Positions
from lightning_nrl._trainer.forward_record import ForwardRecorder, SampleTally
from lightning_nrl._trainer.loaders import split_and_loader
from lightning_nrl._trainer.reference_validation import batches_in_order, validation_loader
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import random_state
from lightning_nrl.data.batch import Adapter
from lightning_nrl.errors import ConfigurationError, PerformanceWarning
from lightning_nrl.localization.training_record import SplitPoint
from lightning_nrl.tasks import Task

__all__ = ["PassListener"]


class PassListener:
    """Takes down what samples do in the batches of a training and of its validations.

    Attributes:
        seconds: what this has taken since `begin`.
    """

    def __init__(self, task: Task, adapter: Adapter) -> None:
        self.task = task
        self.seconds = 0.0
        self._order = OrderObserver()
        self._recorder = ForwardRecorder(task, adapter)
        self._forget()

    def _forget(self) -> None:
        self._tallies: dict[str, SampleTally] = {}
        self._why_not: dict[str, str] = {}
        self._own: set[str] = set()  # splits that need a pass of their own, the same on every rank
        self._validated: dict[str, int] = {}  # the step at which each split was validated last
        self._batches: dict[str, tuple[Any, list[Positions]]] = {}  # of each validated loader
        self._positions: Positions | None = None

    def attach(self, trainer: Trainer, model: LightningModule, *, trains: bool) -> None:
        """Before the model may be compiled and data loaders are made; `trains`: training data are listened to."""
        self._recorder.attach(model)
        if trains:
            self._order.begin(trainer)

    def close(self) -> None:
        """Listens no more, and leaves all as found."""
        self._order.close()
        self._recorder.detach()

    def training_starts(self, trainer: Trainer) -> None:
        """The first iteration of the training data has begun: the loader has its own sampler again."""
        self._order.on_train_start(trainer)

    def begin(self, indices: Mapping[str, Tensor], own: Collection[str]) -> None:
        """Forgets an earlier training.

        Args:
            indices: positions in the data set of the samples of each split.
            own: the splits that the trainer does not run over, or that are not listened to.
        """
        self._forget()
        self.seconds = 0.0
        self._own = set(own)
        self._tallies = {split: SampleTally(self.task, index) for split, index in indices.items()}

    def epoch_starts(self, trainer: Trainer) -> None:
        """An epoch of training starts."""
        if self._listens("train"):
            self._order.on_epoch_start(trainer)

    def batch_starts(
        self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int, *, wanted: bool
    ) -> None:
        """A batch is trained on; `wanted`: it belongs to a point."""
        if not self._listens("train"):
            return
        began = time.perf_counter()
        positions = self._order.on_batch_start(batch_idx)
        self._positions = positions if wanted else None
        if wanted:
            unknown = "the samples of its batches are not known"
            why_not = self._order.why_not() or (unknown if positions is None else "")
            self._give_up("train", why_not or self._recorder.begin(trainer, model, batch))
        self.seconds += time.perf_counter() - began

    def batch_ends(self, trainer: Trainer, model: LightningModule, batch: Any) -> None:
        """A batch was trained on."""
        if self._positions is not None and self._listens("train"):
            self._take("train", trainer, model, batch, self._positions)
            self._positions = None

    def validation_starts(self, trainer: Trainer) -> None:
        """A validation of the fit starts, not the trainer's own check before it."""
        for split in self._tallies:
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

    def validation_batch_starts(self, trainer: Trainer, model: LightningModule, batch: Any, loader: int) -> None:
        """A batch of one of the validation loaders is validated."""
        split = self._validated_split(loader)
        if split is not None:
            self._give_up(split, self._recorder.begin(trainer, model, batch))

    def validation_batch_ends(
        self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int, loader: int
    ) -> None:
        """A batch of one of the validation loaders was validated."""
        split = self._validated_split(loader)
        if split is not None:
            order = self._batches[split][1]
            positions = order[batch_idx] if batch_idx < len(order) else np.zeros(0, np.int64)
            self._take(split, trainer, model, batch, positions)

    def validation_ends(self, step: int) -> None:
        """All loaders were validated at this step."""
        self._validated |= dict.fromkeys(self._batches, step)

    def points(self, ranks: Collective, step: int) -> dict[str, SplitPoint]:
        """What was taken down since the last time, by split; validations that are not of this step do not count.

        Splits that one rank cannot listen to are left out on all from now on, which is warned of.
        """
        self._agree(ranks)
        return {
            split: tally.point(ranks, "training" if split == "train" else "validation")
            for split, tally in self._tallies.items()
            if split not in self._own and (split == "train" or self._validated.get(split) == step)
        }

    def _listens(self, split: str) -> bool:
        return split in self._tallies and split not in self._own and split not in self._why_not

    def _validated_split(self, loader: int) -> str | None:
        """The split of a loader that is validated, if it is listened to."""
        names = ("val", f"val:{loader}") if loader == 0 else (f"val:{loader}",)
        return next((one for one in names if self._listens(one) and one in self._batches), None)

    def _take(self, split: str, trainer: Trainer, model: LightningModule, batch: Any, positions: Positions) -> None:
        began = time.perf_counter()
        self._give_up(split, self._recorder.end(trainer, model, batch, positions, self._tallies[split]))
        self.seconds += time.perf_counter() - began

    def _give_up(self, split: str, why_not: str) -> None:
        if why_not:
            self._why_not.setdefault(split, why_not)

    def _agree(self, ranks: Collective) -> None:
        for split in self._tallies:
            if split not in self._own and (why_not := ranks.first_text(self._why_not.get(split, ""))):
                self._own.add(split)
                problem = f"`TrainingHistory` makes a pass of its own over `{split}` data at every record: {why_not}."
                hint = "record less often (`every_n_epochs=5`), or call `self(x)` once in the step."
                rank_zero_warn(PerformanceWarning(problem, hint))
