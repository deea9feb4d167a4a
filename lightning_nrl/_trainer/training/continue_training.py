"""Continued training of a LightningModule with the known failures added to its data."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, StackDataset, Subset

from lightning_nrl._trainer.lightning.packages import (
    LightningModule,
    ModelPruning,
    Trainer,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import (
    Loaders,
    callbacks_of_class,
    combined_like,
    data_module_of,
)
from lightning_nrl._trainer.reading.loaders import (
    LoaderSource,
    batch_size_of,
    is_stream,
    loader_like,
    loaders_in,
)
from lightning_nrl._trainer.training.inner_trainer import inner_trainer, quiet
from lightning_nrl._trainer.training.module_copy import copied_data_module, copied_module
from lightning_nrl._trainer.training.time_budget import (
    CannotTrainError,
    TimeBudget,
    TrainingTrial,
    describe_failure,
)
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import random_state, seed_all, shuffled
from lightning_nrl._utils.state import State, current_state, shared_tensors
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.data.batch import RawBatch
from lightning_nrl.errors import ConfigurationError, TrainingWarning, first_line
from lightning_nrl.methods import Trained, Training
from lightning_nrl.methods.budget import LEAST_EPOCH

Sample: TypeAlias = Any  # as a data set returns it
Augment = Callable[[RawBatch], RawBatch]
"""Maps a batch of targets, as the data loader returns it, to another batch."""


@dataclass(frozen=True)
class ContinuedTraining(Training):
    """Training of a copy of a module by the module's own step and optimizers.

    See `lightning_nrl.methods.Training`.

    Attributes:
        trainer: trainer of the original training.
        model: the module to copy.
        known: the known data.
        epochs: number of epochs without a time limit.
        left_out: callback classes that the copy drops.
        trained_on: the training loaders.
        augment: augments the targets.
        targeted: bool mask of the targets among the known samples; None: unknown.
        modes: training flags of the submodules; {}: the current flags.
    """

    trainer: Trainer
    model: LightningModule
    known: Sequence[LoaderSource]
    epochs: int
    left_out: tuple[type, ...]
    trained_on: Loaders = field(repr=False)
    augment: Augment | None
    targeted: Tensor | None = None
    modes: Mapping[nn.Module, bool] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.modes:
            # Read once: during a repair, the model is in evaluation mode, and so are all its parts.
            in_evaluation = not self.model.training
            modes = {part: part.training or in_evaluation for part in self.model.modules()}
            object.__setattr__(self, "modes", modes)

    def for_targets(self, targeted: Tensor) -> ContinuedTraining:
        """Returns a copy with a mask of the targets among the known samples."""
        return replace(self, targeted=targeted)

    @property
    def obstacle(self) -> str:
        """Reason why the training cannot continue, or an empty text; the same on all ranks.

        All ranks must read it.
        """
        ranks = Collective.current(self.model.device)
        failed = "known data could not be read on another rank."
        return ranks.first_text(ranks.all_or_none(self._obstacle_here, failed))

    def _obstacle_here(self) -> str:
        if callbacks_of_class(self.trainer, ModelPruning):
            return "pruned weights would not stay 0"
        if len(loaders_in(self.trained_on)) > 1:
            return ""  # several loaders are used as they are
        with random_state():
            return _cannot_collate(self._known_datasets(), self._template_loader().collate_fn)

    def __call__(
        self,
        *,
        seconds: float,
        seed: int,
        clock: StageTimer,
        start: State | None = None,
        weight: Tensor | None = None,
        epochs: int | None = None,
        rate: float | None = None,
    ) -> Trained | None:
        """Trains a copy; leaves the model, trainer, loggers and global random state unchanged.

        With a time limit, times a few steps first and trains as many epochs as fit into `seconds`.
        Without a limit, the same seed gives the same weights. Returns None if weights are not
        finite, if training is impossible, or if not even half an epoch fits.
        """
        end = time.perf_counter() + seconds
        run = _TrainingRun(seed, start or {}, weight, rate)
        if epochs is None:
            epochs = self.epochs
        if (rate is not None and not self.model.automatic_optimization) or self.warn():
            return None
        try:
            with tempfile.TemporaryDirectory() as folder, quiet():
                trained = self._trained(end, clock, epochs, run, folder)
        except CannotTrainError as error:
            self._warn(Collective.current(self.model.device).first_text(str(error)))
            return None
        if trained is None:
            return None
        old = {**current_state(self.model), **run.start}
        if all(torch.equal(old[name], value) for name, value in trained.state.items()):
            name = type(self.model).__name__
            rank_zero_warn(
                TrainingWarning(
                    f"continuing the training of {name} for a repair changed nothing.",
                    "a lambda or closure in the module may use the original, which is then "
                    "trained; make it a method.",
                )
            )
        return trained

    def warn(self) -> bool:
        """Returns True, after a warning, if there is an `obstacle`, and otherwise False."""
        if obstacle := self.obstacle:
            self._warn(obstacle)
        return bool(obstacle)

    def _warn(self, obstacle: str) -> None:
        name = type(self.model).__name__
        rank_zero_warn(
            TrainingWarning(
                f"the training of {name} cannot continue for a repair: {obstacle.rstrip('.')}.",
                "the repair trains by its own steps instead.",
            )
        )

    def _trained(
        self, end: float, clock: StageTimer, epochs: int, run: _TrainingRun, folder: str
    ) -> Trained | None:
        collective = Collective.current(self.model.device)
        planned, share = epochs, 1.0
        if math.isfinite(end):
            pace = TrainingTrial(end, collective)
            self._fit(pace, epochs, run, folder)
            affordable = float(collective.agreed(torch.tensor(pace.epochs(end))))
            if affordable < LEAST_EPOCH:
                return None
            # Schedules end only with the last epoch, so shorter epochs are better than a cut.
            epochs = min(epochs, math.ceil(affordable))
            share = min(1.0, affordable / epochs)
        budget = TimeBudget(end, collective, clock)
        weights = self._fit(budget, epochs, run, folder, share)
        state = {
            name: collective.agreed(value.to(self.model.device)) for name, value in weights.items()
        }
        if not all(bool(value.isfinite().all()) for value in state.values()):
            return None
        done = share * budget.epochs_done
        # Without a time limit, only the module itself can have stopped early, so the training
        # counts as complete.
        return Trained(state, done, planned if math.isfinite(end) else done)

    def _fit(
        self, budget: TimeBudget, epochs: int, run: _TrainingRun, folder: str, share: float = 1.0
    ) -> State:
        """Returns the weights after `epochs` with a share of their batches each."""
        outer = self.trainer

        def copies() -> tuple[LightningModule, Trainer, Loaders]:
            data_sets = [source.loader.dataset for source in self.known]
            try:
                model = copied_module(
                    self.model,
                    {**current_state(self.model), **run.start},
                    self.modes,
                    shared=(outer, data_module_of(outer), *outer.loggers, *data_sets),
                    left_out=self.left_out,
                    rate=run.rate,
                )
                loader = self._loader(run)
                batches = max(1, int(share * len(loader)))
                trainer = inner_trainer(
                    outer, budget, epochs=epochs, batches=batches, folder=folder
                )
            except Exception as error:
                reason = f"it or its trainer cannot be copied ({describe_failure(error)})"
                raise CannotTrainError(reason) from error
            return model, trainer, loader

        with random_state(), torch.enable_grad(), _collected_garbage():
            # Each rank draws its own dropout and augmentation.
            seed_all((run.seed + outer.global_rank) % 2**32)
            model, trainer, loader = budget.on_all_ranks(copies)
            data = data_module_of(outer)
            if data is None:
                budget.on_all_ranks(partial(trainer.fit, model, loader))
            else:
                copied_data = copied_data_module(data, loader)
                budget.on_all_ranks(partial(trainer.fit, model, datamodule=copied_data))
                del copied_data
            # `eval` merges LoRA weights, as they are merged in the model to repair.
            state = shared_tensors(self.model, current_state(budget.on_all_ranks(model.eval)))
            del model, trainer, loader
        return state

    def _loader(self, run: _TrainingRun) -> Loaders:
        if len(loaders_in(self.trained_on)) > 1:
            return combined_like(
                self.trainer,
                self.trained_on,
                lambda like: self._shuffled(like, like.dataset, like.collate_fn, run),
            )
        like = self._template_loader()
        data_sets = self._known_datasets()
        data = data_sets[0] if len(data_sets) == 1 else ConcatDataset(data_sets)
        collate = like.collate_fn
        if self.augment is not None and self.targeted is not None:
            data = StackDataset(data, self.targeted.tolist())  # type: ignore[arg-type]
            collate = AugmentingCollate(collate, self.augment)
        return self._shuffled(like, data, collate, run, run.weight)

    def _shuffled(
        self,
        like: DataLoader[Any],
        data: Dataset[Any],
        collate: Callable[[list[Any]], RawBatch],
        run: _TrainingRun,
        weight: Tensor | None = None,
    ) -> DataLoader[Any]:
        rank = self.trainer.global_rank
        world_size = self.trainer.world_size
        size = batch_size_of(like)
        trained_on = self.trained_on
        if isinstance(trained_on, DataLoader):
            # The user's loader may have a sampler without an index, but a batch size.
            yields_batches = is_stream(trained_on) and trained_on.batch_size is None
            if not yields_batches:
                size = batch_size_of(trained_on)
        sampler = ShuffledSampler(_length(data), run.seed, rank, world_size, weight=weight)
        return loader_like(
            like,
            data,
            batch_size=size,
            sampler=sampler,
            collate_fn=collate,
            # Batch norm cannot train on one sample.
            drop_last=len(sampler) > size and (like.drop_last or len(sampler) % size == 1),
            generator=torch.Generator().manual_seed(run.seed + rank),
            persistent_workers=like.num_workers > 0,
        )

    def _known_datasets(self) -> list[Dataset[Any]]:
        template = self._template_loader().dataset
        data_sets = []
        for source in self.known:
            data = source.loader.dataset
            # Prefer the data set of the training loader, which may augment, for the passed data.
            if source.passed and not source.failed and _length(template) == _length(data):
                data = template
            if source.draws > 1 or len(source.index) != _length(data):
                data = Subset(data, source.index.tolist())
            data_sets.append(data)
        return data_sets

    def _template_loader(self) -> DataLoader[Any]:
        """Returns the training loader, or the first known one if the former reads no samples."""
        loader = self.trained_on
        if (
            isinstance(loader, DataLoader)
            and loader.batch_sampler is not None
            and isinstance(loader.dataset, Sized)
        ):
            return loader
        return self.known[0].loader


@contextmanager
def _collected_garbage() -> Iterator[None]:
    """Frees the large reference cycles that a block leaves; visits no older objects."""
    is_frozen = gc.get_freeze_count() > 0  # by the user
    if not is_frozen:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if not is_frozen:
            gc.unfreeze()


def _length(data: Dataset[Any]) -> int:
    return len(cast(Sized, data))


@dataclass(frozen=True)
class _TrainingRun:
    seed: int
    start: State
    weight: Tensor | None
    rate: float | None


@dataclass(frozen=True)
class AugmentingCollate:
    """Collate function for pairs of a sample and a mark, which augments the marked samples.

    A batch has the unmarked samples, then the marked samples.
    """

    collate: Callable[[list[Sample]], RawBatch]
    augment: Augment

    def __call__(self, samples: Sequence[tuple[Sample, bool]]) -> RawBatch:
        marked = [sample for sample, is_marked in samples if is_marked]
        unmarked = [sample for sample, is_marked in samples if not is_marked]
        if not marked:
            return self.collate(unmarked)
        batch = self.collate(marked)
        try:
            augmented = self.augment(batch)
        except Exception as error:
            raise ConfigurationError(
                f"`augment` raised {type(error).__name__}: {first_line(error)}.",
                "it gets a batch of targets as the data loader returns it.",
            ) from error
        if not unmarked:
            return augmented
        return _concatenate_batches(self.collate(unmarked), augmented)


def _concatenate_batches(batch: RawBatch, augmented: RawBatch) -> RawBatch:
    parts, spec = pytree.tree_flatten(batch, is_leaf=_is_plain_list)
    augmented_parts, augmented_spec = pytree.tree_flatten(augmented, is_leaf=_is_plain_list)
    cause = None
    problem = (
        f"it returned a batch of {len(augmented_parts)} parts, but other batches have {len(parts)}"
    )
    if spec == augmented_spec:
        try:
            return pytree.tree_unflatten(map(_joined, parts, augmented_parts), spec)
        except (RuntimeError, TypeError, AttributeError) as error:
            cause = error
            problem = first_line(error)
    raise ConfigurationError(
        f"`augment`: {problem}.",
        "return a batch of the same form; sizes of tensors may differ only in the number of "
        "samples.",
    ) from cause


def _is_plain_list(part: RawBatch) -> bool:
    return isinstance(part, list) and not any(isinstance(item, Tensor) for item in part)


def _joined(part: RawBatch, augmented: RawBatch) -> RawBatch:
    if isinstance(part, Tensor):
        return torch.cat([part, augmented.to(part)])
    return part + augmented if isinstance(part, list) else part


class ShuffledSampler(Sampler[int]):
    """Sampler that draws `n` samples in random order, divided among the ranks.

    With `weight`, the number of times that a sample is drawn is on average proportional to its
    weight.
    """

    def __init__(
        self,
        n: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        weight: Tensor | None = None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self.weight = weight
        self._n = n
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self._n, generator=self.generator)
        if self.weight is not None and bool((self.weight != self.weight[0]).any()):
            order = self._draw_weighted(order, self.weight)
        # Not as a list, whose integers would take 40 bytes each.
        yield from map(int, order[self._rank :: self._world_size][: len(self)].numpy())

    def _draw_weighted(self, order: Tensor, weight: Tensor) -> Tensor:
        # A sample of weight 2.3 is drawn twice, and with a chance of 0.3 a third time.
        allowed = order[weight[order] > 0]
        weight = (weight / weight.mean())[order]
        chance = torch.rand(len(order), generator=self.generator, dtype=torch.float64)
        drawn = order.repeat_interleave((weight.floor() + (chance < weight.frac())).long())
        drawn = shuffled(drawn, self.generator)
        if len(drawn) < self._n:
            n_repeats = -(-self._n // max(1, len(allowed)))
            drawn = torch.cat([drawn, allowed.repeat(n_repeats)])
        return drawn[: self._n]

    def __len__(self) -> int:
        return self._n // self._world_size


def _cannot_collate(
    data_sets: Sequence[Dataset[Any]], collate: Callable[[list[Any]], RawBatch]
) -> str:
    """Returns why the first samples of the data sets do not fit into one batch, or nothing."""
    problem = "its samples cannot be read"
    try:
        samples = [data[0] for data in data_sets]
        problem = "its samples and the failed ones cannot be put into one batch"
        for batch in (samples, samples[::-1]):
            collate(batch)
    except Exception as error:
        return f"{problem} ({describe_failure(error)})"
    return ""
