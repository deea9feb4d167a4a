"""Borrowing the live model and trainer: everything is as found when they are given back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from lightning_nrl.collective import Collective
from lightning_nrl.errors import explain

__all__ = ["StartingWeights", "evaluating", "random_state", "starting_weights"]


@dataclass
class StartingWeights:
    """Whether the weights that were loaded for a repair are to stay in the model."""

    keep: bool = False


@contextmanager
def evaluating(trainer: pl.Trainer, model: pl.LightningModule) -> Iterator[None]:
    """The model and the trainer as in validation; afterwards each module's training flag and the stage are as found."""
    flags = [(module, module.training) for module in model.modules()]
    stage = trainer.state.stage
    try:
        trainer.state.stage = RunningStage.VALIDATING
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training
        trainer.state.stage = stage


@contextmanager
def random_state() -> Iterator[None]:
    """The global random states of torch, numpy and Python are as found afterwards.

    Also after an exception, where Lightning's `isolate_rng` leaves them as they are then.
    """
    states: list[tuple[Callable[[Any], None], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (np.random.set_state, np.random.get_state()),
        (random.setstate, random.getstate()),
    ]
    if torch.cuda.is_available():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    try:
        yield
    finally:
        for restore, state in states:
            restore(state)


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
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        if path:
            trainer.strategy.load_model_state_dict(trainer.strategy.load_checkpoint(path), strict=model.strict_loading)
        _share(model, Collective.current(model.device))
        yield start
    finally:
        if not start.keep:
            model.load_state_dict(state)
            for buffer, value in buffers:
                buffer.copy_(value)


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
