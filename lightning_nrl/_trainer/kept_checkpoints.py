"""The checkpoints that a trainer's own callbacks have kept, for a method that looks at earlier models."""

from __future__ import annotations

from dataclasses import replace

from lightning_nrl._lightning import ModelCheckpoint, Trainer, callbacks_of
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.methods import Apricot
from lightning_nrl.methods.apricot import NO_CHECKPOINTS_HINT
from lightning_nrl.pipeline.settings import Settings


def with_kept_checkpoints(settings: Settings, trainer: Trainer) -> Settings:
    """Settings whose Apricot has what the trainer's `ModelCheckpoint` callbacks have kept, unless it has others."""
    method = settings.method
    if not isinstance(method, Apricot) or method.checkpoints is not None:
        return settings
    paths = [path for callback in _callbacks(trainer) for path in sorted(callback.best_k_models)]
    return replace(settings, method=replace(method, checkpoints=tuple(paths))) if paths else settings


def check_kept(settings: Settings, trainer: Trainer) -> None:
    """Refuses, before training, an Apricot that will have no checkpoints."""
    method = settings.method
    if isinstance(method, Apricot) and method.checkpoints is None and not _callbacks(trainer):
        raise ConfigurationError("`Apricot.checkpoints`: there will be none.", NO_CHECKPOINTS_HINT)


def _callbacks(trainer: Trainer) -> list[ModelCheckpoint]:
    """Those that keep the best ones."""
    found = [one for one in callbacks_of(trainer) if isinstance(one, ModelCheckpoint)]
    return [one for one in found if one.monitor is not None and one.save_top_k != 0]
