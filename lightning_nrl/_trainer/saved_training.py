"""A training that goes on for a repair, saved at the end of an epoch, and gone on with from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_nrl._lightning import CallbackBase, LightningModule, Trainer
from lightning_nrl._utils.preserve import CpuRandomState
from lightning_nrl._utils.saved_values import UnsavableValueError
from lightning_nrl._utils.saved_work import Piece

__all__ = ["TrainingSeams"]


class TrainingSeams(CallbackBase):
    """Lets a piece of work save a trainer's training after each epoch: what a checkpoint has, and random states.

    Those of workers that load data are not known here: with workers nothing is to be saved.

    Args:
        piece: the training.
        loader: of the training data; its sampler, if any, has its generator as `generator`, too.
        folder: where a checkpoint may be for a moment.
        planned: how many epochs are made.
        left: what was saved before.
        meet: is called before ranks exchange what is saved, so that one that failed is met there.
    """

    def __init__(
        self,
        piece: Piece,
        loader: DataLoader[Any],
        folder: str,
        planned: int,
        left: Mapping[str, Any] | None,
        meet: Callable[[], object],
    ) -> None:
        self._piece, self._loader, self._planned, self._left, self._meet = piece, loader, planned, left, meet
        self._path = Path(folder) / "left.ckpt"

    def checkpoint(self) -> str | None:
        """The path of the checkpoint to go on from, for `fit`; None: there is none."""
        if self._left is None:
            return None
        torch.save(self._left["checkpoint"], self._path)
        return str(self._path)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last hook before data are read."""
        if self._left is not None:
            for generator, state in zip(self._generators(), self._left["generators"], strict=True):
                generator.set_state(state)
            _restore_random(self._left["random"])
            self._left = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves behind the module's own end of an epoch, which is later than that of callbacks.

        Training that goes on does not make it up. The module is a copy of the user's.
        """
        own = pl_module.on_train_epoch_end

        def ended() -> None:
            own()
            self._meet()
            self._piece.seam(partial(self._saved, trainer))

        pl_module.on_train_epoch_end = ended  # type: ignore[method-assign]

    def _saved(self, trainer: Trainer) -> dict[str, Any]:
        randomness = _random()
        trainer.save_checkpoint(self._path, weights_only=False)
        try:
            checkpoint = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception as error:  # a module's own objects are in it
            raise UnsavableValueError(str(error)) from error
        finally:
            self._path.unlink(missing_ok=True)
        generators = [generator.get_state() for generator in self._generators()]
        return {"checkpoint": checkpoint, "generators": generators, "random": randomness, "epochs": self._planned}

    def _generators(self) -> list[torch.Generator]:
        found = (self._loader.generator, getattr(self._loader.sampler, "generator", None))
        return [generator for generator in found if isinstance(generator, torch.Generator)]


def _random() -> dict[str, Any]:
    """The global random states as plain values."""
    cuda: Any = torch.cuda
    on_devices = cuda.get_rng_state_all() if cuda.is_initialized() else []
    return {**CpuRandomState.current().as_plain(), "cuda": on_devices}


def _restore_random(saved: Mapping[str, Any]) -> None:
    CpuRandomState.from_plain(saved).restore()
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])
