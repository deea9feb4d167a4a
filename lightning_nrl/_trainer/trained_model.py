"""A trained module and its data as a trainer holds them in the middle of a fit: what the core is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl

from lightning_nrl._lightning import batch_limit, validating
from lightning_nrl._trainer.continue_training import EPOCHS, ContinuedTraining
from lightning_nrl._trainer.data_splits import DataRequest
from lightning_nrl._trainer.loaders import LoaderSource, SplitLoaders, warn_if_random
from lightning_nrl._trainer.progress import RepairProgress
from lightning_nrl._trainer.trainer_state import make_evaluator
from lightning_nrl._utils.preserve import random_state
from lightning_nrl.data.batch import Adapter
from lightning_nrl.evaluation import Evaluator
from lightning_nrl.tasks import Task

__all__ = ["TrainedModel", "TrainerRequest"]


@dataclass(frozen=True)
class TrainedModel:
    """A trained module and its data, as they are inside a fit.

    Attributes:
        model: on its device.
        known: the data that a repair may look at.
        unseen: the data that are only counted.
        calibration: the data that no search looks at, to choose the strength by.
        training: would go on with the training.
        evaluator: the module as its trainer runs it.
        observer: shows progress; None: nothing does.
    """

    model: pl.LightningModule
    known: list[LoaderSource]
    unseen: list[LoaderSource]
    calibration: list[LoaderSource]
    training: ContinuedTraining
    evaluator: Evaluator
    observer: RepairProgress | None = None


@dataclass(frozen=True)
class TrainerRequest:
    """What a repair asks of a trainer.

    Attributes:
        data: which of its data are known, unseen and for calibration.
        adapter: takes a batch apart.
        seed: of random transforms of the data sets.
        task: what passed and loss mean.
        left_out: kinds of callbacks that the module may ask for, and that a training that goes on does not get.
    """

    data: DataRequest
    adapter: Adapter
    seed: int
    task: Task
    left_out: tuple[type, ...]

    @contextmanager
    def sample(self, trainer: pl.Trainer, model: pl.LightningModule) -> Iterator[TrainedModel]:
        """The model with one batch of each split; inside, the trainer says that it validates."""
        with random_state(), validating(trainer):
            yield self._trained(trainer, model, EPOCHS, limit=1, whole=False)

    @contextmanager
    def opened(
        self, trainer: pl.Trainer, model: pl.LightningModule, epochs: int, *, whole: bool = False
    ) -> Iterator[TrainedModel]:
        """The model with all its data, in a `fast_dev_run` a few batches of them; random states stay as they are.

        Args:
            trainer: in the middle of a fit. Inside it says that it validates, and shows progress.
            model: its module.
            epochs: how many the model was trained for.
            whole: whether each rank reads all of the data.

        Raises:
            ConfigurationError: the data cannot be used.
        """
        with random_state(), validating(trainer), RepairProgress(trainer) as progress:
            found = self._trained(trainer, model, epochs, limit=batch_limit(trainer), whole=whole)
            warn_if_random(found.known)
            yield replace(found, observer=progress)

    def _trained(
        self, trainer: pl.Trainer, model: pl.LightningModule, epochs: int, *, limit: int | None, whole: bool
    ) -> TrainedModel:
        how: dict[str, Any] = {"adapter": self.adapter, "seed": self.seed, "limit": limit, "whole": whole}
        loaders = SplitLoaders(trainer, model)
        known, unseen, calibration = self.data.sources(loaders, **how)
        training = ContinuedTraining(trainer, model, known, epochs, self.left_out, loaders.get("train"))
        return TrainedModel(model, known, unseen, calibration, training, make_evaluator(trainer, model, self.task))
