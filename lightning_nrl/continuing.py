"""Going on with the training of a LightningModule, the known failures added to its data."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelPruning
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset
from typing_extensions import override

from lightning_nrl.as_found import random_state
from lightning_nrl.clock import Clock
from lightning_nrl.collective import Collective
from lightning_nrl.errors import ConfigurationError, explain
from lightning_nrl.inner import copied_data_module, copied_module, inner_trainer, quiet
from lightning_nrl.loaders import LoaderSource, find_loader, worker_settings
from lightning_nrl.state import State, snapshot

__all__ = ["ContinuedTraining", "epochs_of"]

EPOCHS = 20
"""Where nobody knows how long the model was trained: half of what networks of this kind are usually given."""
FEWEST = 3
"""A schedule squeezed into fewer epochs than these leaves the model worse than it was."""
WARM_UP, TIMED = 3, 10
"""Batches before the pace is even, and batches that it is measured on."""
TRIAL = 0.1
"""Share of the time that measuring the pace may take."""
RESERVE = 0.1
"""Share of the time that is kept for a pace slower than it was measured."""


@dataclass(frozen=True)
class ContinuedTraining:
    """Trains a copy of a module by a trainer of its own (see `lightning_nrl.methods.Training`).

    The module's own `training_step`, optimizers, schedules and augmentation do it, with the precision, clipping and
    accumulation of the outer trainer. The data are those of the passed and of the failed samples, each once an epoch,
    in batches as large as in training. Callbacks of the outer trainer have no part in it.

    Attributes:
        trainer: in the middle of a fit.
        model: its module, not yet in evaluation mode.
        known: the known splits.
        epochs: at most so many.
        left_out: kinds of callbacks that the module may ask for and does not get.
        modes: the training flag of each part of the model.
        trained_on: the loader that the model was trained on, as the user gave it.
    """

    trainer: pl.Trainer
    model: pl.LightningModule
    known: Sequence[LoaderSource]
    epochs: int = EPOCHS
    left_out: tuple[type, ...] = ()
    modes: tuple[bool, ...] = field(init=False, repr=False)
    trained_on: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        whole = self.model.training
        modes = tuple(module.training or not whole for module in self.model.modules())
        object.__setattr__(self, "modes", modes)
        # Asked once only: a data module may make its data anew every time.
        object.__setattr__(self, "trained_on", find_loader("train", self.trainer, self.model))

    @property
    def obstacle(self) -> str:
        """Why training cannot go on, in words; empty if it can. Reads two samples and trains nothing."""
        if any(isinstance(callback, ModelPruning) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            return "pruned weights would not stay 0"
        if isinstance(self.trained_on, (Mapping, list, tuple)):
            return "it was trained on several data loaders at once"
        with random_state():
            return _cannot_collate(self._parts(), self._like().collate_fn)

    def __call__(self, *, seconds: float, seed: int, clock: Clock, start: State | None = None) -> State | None:
        """Trains a copy; the model, its trainer, its loggers and the global random state stay as they are.

        With a limit of time, a few steps are timed first, and as many epochs are trained as fit.

        Args:
            seconds: how long that may take; infinite: `epochs` epochs.
            seed: of the order of the samples and of all else that is random. Without a limit of time the same seed
                gives the same weights.
            clock: is told how many batches of how many were trained on.
            start: weights to begin with; None: the model's own.

        Returns:
            Every parameter and persistent buffer, on the model's device; None if the time is too short, the weights
            are not finite, or training cannot go on, which is warned of.
        """
        end = time.perf_counter() + seconds
        if self.warn():
            return None
        try:
            with tempfile.TemporaryDirectory() as folder, quiet():
                return self._trained(end, seed, clock, start or {}, folder)
        except (_NoCopyError, ConfigurationError, torch.cuda.OutOfMemoryError) as error:
            self._warn(str(error).partition("\n")[0])
            return None

    def warn(self) -> bool:
        """Warns if training cannot go on, and says whether it did."""
        obstacle = self.obstacle
        if obstacle:
            self._warn(obstacle)
        return bool(obstacle)

    def _warn(self, obstacle: str) -> None:
        rank_zero_warn(
            explain(
                f"the training of {type(self.model).__name__} cannot go on for a repair: {obstacle}.",
                "the repair makes steps of its own instead.",
            )
        )

    def _trained(self, end: float, seed: int, clock: Clock, start: State, folder: str) -> State | None:
        collective, epochs = Collective.current(self.model.device), self.epochs
        if math.isfinite(end):
            pace = _Pace(end, collective)
            self._fit(pace, epochs, seed, start, folder)
            epochs = min(epochs, pace.epochs(end))
        epochs = int(collective.agreed(torch.tensor(epochs)))
        if epochs < min(FEWEST, self.epochs):
            return None
        model = self._fit(_Course(end, collective, clock), epochs, seed, start, folder)
        state = {name: collective.agreed(value.to(self.model.device)) for name, value in snapshot(model).items()}
        return state if all(bool(value.isfinite().all()) for value in state.values()) else None

    def _fit(self, course: _Course, epochs: int, seed: int, start: State, folder: str) -> pl.LightningModule:
        """A copy after training."""
        outer = self.trainer
        data: Any = outer.datamodule  # type: ignore[attr-defined]
        live = {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)}
        shared = (outer, data, *outer.loggers, *(source.loader.dataset for source in self.known))
        try:
            model = copied_module(self.model, {**live, **start}, self.modes, shared=shared, left_out=self.left_out)
        except Exception as error:
            raise _NoCopyError(f"it cannot be copied ({type(error).__name__}: {error})") from error
        with random_state(), torch.enable_grad():
            for seed_global in (torch.manual_seed, np.random.seed, random.seed):
                seed_global(seed)
            loader = self._loader(seed)
            trainer = inner_trainer(outer, course, epochs=epochs, folder=folder)
            if data is None:
                trainer.fit(model, loader)
            else:
                trainer.fit(model, datamodule=copied_data_module(data, loader))
        return model

    def _loader(self, seed: int) -> DataLoader[Any]:
        """All training data, read as the outer trainer reads its own."""
        like, parts = self._like(), self._parts()
        data = parts[0] if len(parts) == 1 else ConcatDataset(parts)
        size = like.batch_size or getattr(like.batch_sampler, "batch_size", None) or 1
        sampler = Shuffled(len(data), seed, self.trainer.global_rank, self.trainer.world_size)  # type: ignore[arg-type]
        return DataLoader(
            data,
            batch_size=size,
            sampler=sampler,
            # Batch norm cannot train on one sample.
            drop_last=len(sampler) > size and (like.drop_last or len(sampler) % size == 1),
            collate_fn=like.collate_fn,
            pin_memory=like.pin_memory and torch.cuda.is_available(),
            worker_init_fn=like.worker_init_fn,
            generator=torch.Generator().manual_seed(seed),
            persistent_workers=like.num_workers > 0,
            **worker_settings(like),
        )

    def _parts(self) -> list[Dataset[Any]]:
        """What the known splits hold, and for passed data a view of them that augments, where there is one."""
        like, parts = self._like(), []
        for source in self.known:
            data = source.loader.dataset
            if source.passed and not source.failed and len(like.dataset) == len(data):  # type: ignore[arg-type]
                data = like.dataset
            whole = len(source.index) == len(data)  # type: ignore[arg-type]
            parts.append(data if whole else Subset(data, source.index.tolist()))
        return parts

    def _like(self) -> DataLoader[Any]:
        """The loader whose batches the module was trained on; where it is not known, that of the passed data."""
        loader = self.trained_on
        if isinstance(loader, DataLoader) and loader.batch_sampler is not None and hasattr(loader.dataset, "__len__"):
            return loader
        return self.known[0].loader


def epochs_of(progress: Any) -> int:
    """How many epochs a training had, at least 1.

    Args:
        progress: the fit loop's `epoch_progress`, or the part of a checkpoint that holds it.
    """
    current = progress["current"] if isinstance(progress, Mapping) else vars(progress.current)
    return max(1, int(current["ready"]))


class Shuffled(Sampler[int]):
    """Every sample once an epoch, in an order of its own; ranks share them in equal parts.

    Args:
        n: how many samples there are.
        seed: of the orders.
        rank: whose share this is.
        world_size: how many ranks there are.
    """

    def __init__(self, n: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._n, self._rank, self._world_size = n, rank, world_size
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self._n, generator=self._generator)
        yield from order[self._rank :: self._world_size][: len(self)].tolist()

    def __len__(self) -> int:
        return self._n // self._world_size


class _NoCopyError(Exception):
    """The module cannot be copied."""


class _Course(Callback):
    """Keeps ranks in step, stops when the time is over, and tells how far training is.

    Args:
        end: when the time is over, by `time.perf_counter`.
        collective: the ranks that train.
        clock: is told.
    """

    def __init__(self, end: float, collective: Collective, clock: Clock | None = None) -> None:
        self._end, self._collective, self._clock = end, collective, clock
        self._done = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            # What is measured on validation data is not there.
            config.strict = False

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Averages gradients over ranks; those that are accumulated are the same on all ranks, and stay so."""
        if self._collective.world_size > 1:
            _average_gradients(pl_module, self._collective)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._done += 1
        total = int(trainer.num_training_batches) * int(trainer.max_epochs or 1)
        if self._clock is not None and (self._done % max(1, total // 200) == 0 or self._done == total):
            self._clock.tell(self._done, total, 0, 0)
        if math.isfinite(self._end) and self._collective.any(self._is_over(pl_module.device)):
            trainer.should_stop = True

    def _is_over(self, device: torch.device) -> bool:
        return time.perf_counter() > self._end


class _Pace(_Course):
    """Stops after a few batches and says how many epochs there is time for.

    Args:
        end: when the time for all of training is over.
        collective: the ranks that train.
    """

    def __init__(self, end: float, collective: Collective) -> None:
        began = time.perf_counter()
        super().__init__(began + TRIAL * (end - began), collective)
        self._ends: list[float] = []
        self._epoch = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._epoch = int(trainer.num_training_batches)
        self._ends = [time.perf_counter()]

    def epochs(self, end: float) -> int:
        """Epochs that fit in the time from now on."""
        if len(self._ends) < 2:
            return 0
        started = self._ends[1] - self._ends[0]
        even = self._ends[WARM_UP:] if len(self._ends) > WARM_UP + 1 else self._ends
        batch = (even[-1] - even[0]) / (len(even) - 1)
        left = (end - time.perf_counter()) * (1 - RESERVE) - started
        return int(left / max(batch * self._epoch, 1e-9))

    def _is_over(self, device: torch.device) -> bool:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._ends.append(time.perf_counter())
        return len(self._ends) > WARM_UP + TIMED or super()._is_over(device)


@torch.no_grad()
def _average_gradients(model: pl.LightningModule, collective: Collective) -> None:
    """Parameters without a gradient on some ranks count as 0 there; without one on any rank they stay without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ranks = collective.sum(torch.tensor([parameter.grad is not None for parameter in parameters]))
    parameters = [parameter for parameter, n in zip(parameters, ranks.tolist(), strict=True) if n]
    if not parameters:
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    mean = collective.sum(torch.cat([p.grad.flatten() for p in parameters])) / collective.world_size  # type: ignore[union-attr]
    for parameter, values in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(values.view_as(parameter))  # type: ignore[union-attr]


def _cannot_collate(parts: Sequence[Dataset[Any]], collate: Any) -> str:
    """Why samples of several data sets do not make one batch, in words; empty if they do."""
    samples = [part[0] for part in parts]
    for batch in (samples, samples[::-1]):
        try:
            collate(batch)
        except Exception as error:
            text = str(error).partition("\n")[0]
            return f"its samples and the failed ones do not make one batch ({type(error).__name__}: {text})"
    return ""
