"""The checkpoints that a trainer's own callbacks have kept, for a method that looks at earlier models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_nrl._lightning.packages import ModelCheckpoint, Trainer
from lightning_nrl._lightning.private_parts import callbacks_of
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.methods.apricot import NO_CHECKPOINTS_HINT
from lightning_nrl.pipeline.settings import Settings


def with_kept_checkpoints(settings: Settings, trainer: Trainer) -> Settings:
    """Settings whose method has what the trainer's `ModelCheckpoint` callbacks have kept, if it wants them."""
    method: Any = settings.method
    if not getattr(method, "wants_checkpoints", False):
        return settings
    paths = [path for callback in _callbacks(trainer) for path in sorted(callback.best_k_models)]
    return replace(settings, method=method.with_checkpoints(paths)) if paths else settings


def check_kept(settings: Settings, trainer: Trainer) -> None:
    """Refuses, before training, a method that wants checkpoints and will have none."""
    if getattr(settings.method, "wants_checkpoints", False) and not _callbacks(trainer):
        name = type(settings.method).__name__
        raise ConfigurationError(f"`{name}.checkpoints`: there will be none.", NO_CHECKPOINTS_HINT)


def _callbacks(trainer: Trainer) -> list[ModelCheckpoint]:
    """Those that keep the best ones."""
    found = [one for one in callbacks_of(trainer) if isinstance(one, ModelCheckpoint)]
    return [one for one in found if one.monitor is not None and one.save_top_k != 0]
