"""Trainers under which a repair cannot be made, known before training starts."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelPruning
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from lightning_nrl._lightning import averaging_callbacks, callbacks_of
from lightning_nrl.errors import ConfigurationError, NotRepairedWarning

__all__ = ["check_namespace", "check_order", "check_strategy", "warn_without_step"]

SHARDED = ("FSDP", "DeepSpeed", "ModelParallel", "XLA")


def check_namespace(trainer: Any) -> None:
    """Refuses a trainer of the package `lightning`, whose classes are others than those of `pytorch_lightning`."""
    if not isinstance(trainer, pl.Trainer):
        raise ConfigurationError(
            f"`trainer`: found a {type(trainer).__name__} of `{type(trainer).__module__}`.",
            "import everything from `pytorch_lightning`; the classes of `lightning.pytorch` do not mix with it.",
        )


def check_strategy(
    trainer: pl.Trainer,
    why: str = "a repair needs them whole",
    hint: str = "train with it, then call `lightning_nrl.repair` on the checkpoint with a single device or ddp.",
) -> None:
    """Refuses strategies that shard the model, under which no rank holds the whole layer."""
    name = type(trainer.strategy).__name__
    if name.startswith(SHARDED) or "Sharded" in name:
        raise ConfigurationError(f"`strategy`: {name} shards the weights, {why}.", hint)


def check_order(
    callback: Callback,
    trainer: pl.Trainer,
    earlier: tuple[type, ...] = (),
    start_from: str = "last",
    what: str = "the repair",
) -> None:
    """Refuses places among the callbacks where one change of the weights after training undoes another.

    After it: weight averaging, pruning, and what has to come `earlier`. Before it, if it goes back to the best
    checkpoint: one of its own kind, and what has to come `earlier`.
    """
    overwriting = (*averaging_callbacks(), ModelPruning, *earlier)
    callbacks = callbacks_of(trainer)
    place = callbacks.index(callback)
    behind = [c for c in callbacks[place + 1 :] if isinstance(c, overwriting)]
    if behind:
        raise ConfigurationError(
            f"`callbacks`: {type(behind[0]).__name__} comes after {what} and would undo it.",
            f"put {type(callback).__name__} after it.",
        )
    before = [c for c in callbacks[:place] if isinstance(c, (type(callback), *earlier))]
    if start_from == "best" and before:
        repairs = isinstance(before[0], type(callback))
        whose = "the repair before this one" if repairs else f"{type(before[0]).__name__} before it"
        hint = "say `start_from='best'` to the first repair alone; the next ones go on from what it left."
        raise ConfigurationError(
            f"`start_from='best'`: the best checkpoint lacks what {whose} does.",
            hint if repairs else "leave `start_from='best'` out; the repair goes on from what it left.",
        )


def warn_without_step() -> None:
    """Says that a fit without a training step leaves nothing repaired."""
    rank_zero_warn(
        NotRepairedWarning(
            "no repair was made, because no training step ran (training was complete, skipped or stopped).",
            "to repair a trained checkpoint, call `lightning_nrl.repair(trainer, model, ckpt_path=...)`.",
        )
    )
