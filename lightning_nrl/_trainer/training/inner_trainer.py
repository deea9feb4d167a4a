"""A silent inner trainer, which logs, saves and prints nothing."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_nrl._trainer.lightning.null_logger import NullLogger
from lightning_nrl._trainer.lightning.packages import (
    LOGGER_NAMES,
    Callback,
    Trainer,
    class_for,
)


def inner_trainer(
    outer: Trainer, callback: Callback, *, epochs: int, batches: int, folder: str
) -> Trainer:
    """Returns a trainer with the device, precision, clipping and accumulation of `outer`."""
    device = outer.strategy.root_device
    max_steps = -1
    if outer.max_steps >= 0:
        # The epochs end the training; schedules may read `max_steps`.
        max_steps = epochs * math.ceil(batches / outer.accumulate_grad_batches)
    trainer: Trainer = class_for(outer, "pytorch.Trainer")(
        accelerator=device.type,
        strategy=class_for(outer, "pytorch.strategies.SingleDeviceStrategy")(device),
        devices=1,
        # The outer trainer handles the cluster.
        plugins=[class_for(outer, "fabric.plugins.environments.LightningEnvironment")()],
        precision=outer.precision,
        max_epochs=epochs,
        max_steps=max_steps,
        limit_train_batches=batches,
        gradient_clip_val=outer.gradient_clip_val,
        gradient_clip_algorithm=outer.gradient_clip_algorithm,
        accumulate_grad_batches=outer.accumulate_grad_batches,
        callbacks=[callback],
        logger=[NullLogger(folder) for _ in outer.loggers],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    return trainer


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Lightning's log and all warnings for a block; the user's trainer has shown them."""
    levels = {logger: logger.level for logger in map(logging.getLogger, LOGGER_NAMES)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
