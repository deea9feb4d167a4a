"""Reading and writing of a trainer's checkpoints: safe loading, and synchronous writing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from lightning_nrl._trainer.lightning.packages import (
    AsyncCheckpointIO,
    CheckpointIO,
    TorchCheckpointIO,
    Trainer,
    WrappingCheckpointIO,
    WrappingCheckpointIOBase,
    classes,
    load_checkpoint,
)
from lightning_nrl._utils.checkpoint import reason
from lightning_nrl.errors import ConfigurationError

TRUSTED_FILE_HINT = (
    "if you trust the file, set `weights_only=False`, or load the model from it yourself."
)


@contextmanager
def reading_checkpoints(
    trainer: Trainer,
    argument: str,
    *,
    weights_only: bool = True,
    otherwise: str = TRUSTED_FILE_HINT,
) -> Iterator[None]:
    """Makes a trainer refuse checkpoints of other objects than tensors and plain values in a block.

    With `weights_only=False`, it reads such checkpoints. Errors name `argument`, and their hint
    ends with `otherwise`. By itself, Lightning 2.5 runs any code in a checkpoint, and 2.6 does so
    if the checkpoint is from a URL. Custom checkpoint plugins for other formats are not affected.
    """
    strategy = trainer.strategy
    stored = strategy.checkpoint_io
    is_known = isinstance(stored, (TorchCheckpointIO, WrappingCheckpointIO))
    if isinstance(stored, _CheckpointReader) or not is_known:
        yield
        return
    strategy.checkpoint_io = reader = _CheckpointReader(stored, argument, weights_only, otherwise)
    try:
        yield
    except RuntimeError as error:
        _, misfit, keys = str(error).partition("Error(s) in loading state_dict for ")
        if not misfit or not reader.path:
            raise
        raise ConfigurationError(
            f"`{argument}={reader.path!r}` does not fit {shorten(keys, 300)}",
            "make the model with the hyperparameters with which the checkpoint was trained. If a "
            "buffer grows in training, it needs `persistent=False`, and the module "
            "`strict_loading = False`.",
        ) from error
    except KeyError as error:
        key = error.args[0]
        if key not in ("pytorch-lightning_version", "state_dict") or not reader.path:
            raise
        raise ConfigurationError(
            f"`{argument}={reader.path!r}` is no Lightning checkpoint: it has no `{key}`.",
            "if it is a state dict, load it by `model.load_state_dict(torch.load(path))` and give "
            "no checkpoint.",
        ) from error
    finally:
        strategy.checkpoint_io = stored


class _CheckpointReader(WrappingCheckpointIOBase):
    def __init__(
        self, stored: CheckpointIO, argument: str, weights_only: bool, otherwise: str
    ) -> None:
        super().__init__(stored)
        self._argument = argument
        self._weights_only = weights_only
        self._otherwise = otherwise
        self.path = ""  # path of the checkpoint that was read last

    def teardown(self) -> None:
        if self.checkpoint_io is not None:
            self.checkpoint_io.teardown()

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        try:
            checkpoint: dict[str, Any] = load_checkpoint(
                path, map_location=map_location or "cpu", weights_only=self._weights_only
            )
        except Exception as error:
            hint = (
                "give a checkpoint of tensors and plain values. Other objects can run any code: "
                f"{self._otherwise}"
            )
            if isinstance(error, OSError):
                hint = "give the path of a checkpoint that can be read."
            raise ConfigurationError(
                f"`{self._argument}={str(path)!r}` cannot be read ({reason(error)}).", hint
            ) from error
        self.path = str(path)
        return checkpoint


class CheckpointWriter(WrappingCheckpointIOBase):
    """Checkpoint plugin that writes with the user's own plugin, or with `torch.save` by default.

    An exception is stored as `error` and not raised, since other ranks would wait forever for the
    rank that writes.
    """

    def __init__(self, stored: CheckpointIO) -> None:
        super().__init__(stored)
        inner: CheckpointIO | None = stored
        if isinstance(inner, _CheckpointReader):
            inner = inner.checkpoint_io
        if isinstance(inner, AsyncCheckpointIO):
            inner = inner.checkpoint_io
        # True if `torch.load` reads the file.
        self.is_plain = type(inner) in classes("pytorch.plugins.io.TorchCheckpointIO")
        self.error: Exception | None = None
        self.state_dict: Mapping[str, Any] = {}  # of the checkpoint to write

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        self.state_dict = checkpoint.get("state_dict", {})
        if self.error is not None:  # no folder to write to
            return
        try:
            if self.is_plain:
                torch.save(checkpoint, path)
            else:
                super().save_checkpoint(checkpoint, path, storage_options)
        except Exception as error:
            self.error = error


@contextmanager
def writing_checkpoint(trainer: Trainer) -> Iterator[CheckpointWriter]:
    """Replaces the trainer's checkpoint plugin by a `CheckpointWriter` for a block."""
    stored = trainer.strategy.checkpoint_io
    trainer.strategy.checkpoint_io = writer = CheckpointWriter(stored)
    try:
        yield writer
    finally:
        trainer.strategy.checkpoint_io = stored
