"""Borrowing the trainer and its model: everything is as found when they are given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from lightning_nrl.collective import Collective
from lightning_nrl.errors import explain

__all__ = ["StartingWeights", "starting_weights", "validating"]


@dataclass
class StartingWeights:
    """Whether the weights that were loaded for a repair are to stay in the model."""

    keep: bool = False


@contextmanager
def validating(trainer: pl.Trainer) -> Iterator[None]:
    """The trainer says that it validates, so that augmentation which asks it is left to training."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


@contextmanager
def starting_weights(start_from: str, trainer: pl.Trainer, model: pl.LightningModule) -> Iterator[StartingWeights]:
    """The model that a repair starts from, the same on every rank.

    With `last` that is the model as it is; ranks whose buffers differ, such as statistics of a batch norm that is not
    synchronised, get those of the first rank, which are what a checkpoint holds. With `best` it is the best checkpoint.
    Everything comes back bit for bit afterwards, also after an exception, unless `keep` was set.
    """
    start = StartingWeights()
    path = _best_path(trainer) if start_from == "best" else ""
    if not path and trainer.world_size == 1:
        yield start
        return
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        if path:
            trainer.strategy.load_model_state_dict(trainer.strategy.load_checkpoint(path), strict=model.strict_loading)
        _share(model, Collective.current(model.device))
        yield start
    finally:
        if not start.keep:
            with torch.no_grad():
                for tensor, value in tensors:
                    tensor.copy_(value)


def _best_path(trainer: pl.Trainer) -> str:
    checkpoint = trainer.checkpoint_callback
    path = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
    if not path:
        rank_zero_warn(
            explain(
                "`start_from='best'`: no best checkpoint was saved, the repair starts from the last weights.",
                "add a ModelCheckpoint with `monitor=`.",
            )
        )
    return path


@torch.no_grad()
def _share(model: pl.LightningModule, collective: Collective) -> None:
    """Gives every rank the first rank's buffers."""
    for buffer in model.buffers():
        buffer.copy_(collective.sum(buffer if collective.rank == 0 else torch.zeros_like(buffer)))
