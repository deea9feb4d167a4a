"""Continued training of a LightningModule with the known failures added to its data."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from lightning_nrl._trainer.data_splits import find_loader
from lightning_nrl._trainer.inner_trainer import (
    CannotTrainError,
    TimeBudget,
    TrainingTrial,
    copied_data_module,
    copied_module,
    describe_failure,
    inner_trainer,
    quiet,
)
from lightning_nrl._trainer.lightning.packages import (
    LightningModule,
    ModelPruning,
    Trainer,
    rank_zero_warn,
)
from lightning_nrl._trainer.lightning.private_parts import (
    callbacks_of,
    combined_like,
    data_module_of,
)
from lightning_nrl._trainer.loaders import LoaderSource, batch_size_of, loader_like, loaders_in
from lightning_nrl._trainer.trainer_state import ASSUMED_EPOCHS
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import eval_mode, random_state, seed_all
from lightning_nrl._utils.state import State, current_state, snapshot
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.errors import ConfigurationError, TrainingWarning, first_line
from lightning_nrl.methods.problem import Renew, Trained

Augment = Callable[[Any], Any]
"""Maps a batch of targets, as the data loader returns it, to another batch."""


@dataclass(frozen=True)
class ContinuedTraining:
    """Training of a copy of a module by the module's own step and optimizers (see
    `lightning_nrl.methods.Training`).
    """

    trainer: Trainer
    model: LightningModule
    known: Sequence[LoaderSource]
    epochs: int = ASSUMED_EPOCHS
    left_out: tuple[type, ...] = ()  # callback classes that the copy drops
    trained_on: Any = field(
        default=None, repr=False
    )  # the training loaders; None: those of the trainer
    augment: Augment | None = None
    targeted: Tensor | None = (
        None  # bool mask of the targets among the known samples; None: unknown
    )
    modes: tuple[bool, ...] = field(
        default=(), repr=False
    )  # training flag of each submodule; (): the current flags

    def __post_init__(self) -> None:
        if not self.modes:
            # Read once: during a repair, the model is in evaluation mode.
            whole = self.model.training
            modes = tuple(module.training or not whole for module in self.model.modules())
            object.__setattr__(self, "modes", modes)
        if self.trained_on is None:
            # Read once: a data module may create its data again on each call.
            object.__setattr__(self, "trained_on", find_loader("train", self.trainer, self.model))

    def for_targets(self, targeted: Tensor) -> ContinuedTraining:
        """Returns a copy with the mask `targeted`: bool, one entry for each known sample, True for
        the targets.
        """
        return replace(self, targeted=targeted)

    @property
    def obstacle(self) -> str:
        """Reason why the training cannot continue, or an empty text. All ranks must read it, and
        get the same text.
        """
        ranks = Collective.current(self.model.device)
        found = ranks.all_or_none(
            self._obstacle_here, "known data could not be read on another rank."
        )
        return ranks.first_text(found)

    def _obstacle_here(self) -> str:
        if any(isinstance(callback, ModelPruning) for callback in callbacks_of(self.trainer)):
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
        renew: Renew | None = None,
    ) -> Trained | None:
        """Trains a copy; leaves the model, its trainer, its loggers and the global random state
        unchanged.

        With a time limit, times a few steps first and trains as many epochs as fit into `seconds`.
        Without a limit, the same seed gives the same weights. Returns None if `renew` stops the
        training, if weights are not finite, if training is impossible, or if not even one epoch
        fits.
        """
        end, run = (
            time.perf_counter() + seconds,
            _TrainingRun(seed, start or {}, weight, rate, renew),
        )
        epochs = self.epochs if epochs is None else epochs
        if (run.rate is not None and not self.model.automatic_optimization) or self.warn():
            return None
        try:
            with tempfile.TemporaryDirectory() as folder, quiet():
                trained = self._trained(end, clock, epochs, run, folder)
        except CannotTrainError as error:
            self._warn(Collective.current(self.model.device).first_text(str(error)))
            return None
        before = {**current_state(self.model), **run.start}
        if trained is not None and all(
            torch.equal(value, trained.state[name]) for name, value in before.items()
        ):
            problem = f"continuing the training of {type(self.model).__name__} for a repair changed nothing."
            hint = "a lambda or closure in the module may use the original, which is then trained; make it a method."
            rank_zero_warn(TrainingWarning(problem, hint))
        return trained

    def warn(self) -> bool:
        """Returns True, after a warning, if there is an `obstacle`, and otherwise False."""
        if obstacle := self.obstacle:
            self._warn(obstacle)
        return bool(obstacle)

    def _warn(self, obstacle: str) -> None:
        name, reason = type(self.model).__name__, obstacle.rstrip(".")
        problem = f"the training of {name} cannot continue for a repair: {reason}."
        rank_zero_warn(TrainingWarning(problem, "the repair trains by its own steps instead."))

    def _trained(
        self, end: float, clock: StageTimer, epochs: int, run: _TrainingRun, folder: str
    ) -> Trained | None:
        collective, planned = Collective.current(self.model.device), epochs
        if math.isfinite(end):
            pace = TrainingTrial(end, collective)
            self._fit(pace, epochs, replace(run, renew=None), folder)
            epochs = min(epochs, pace.epochs(end))
        epochs = int(collective.agreed(torch.tensor(epochs)))
        if epochs < 1:
            return None
        # `renew` runs at half time, so one epoch becomes two with half of the samples each.
        parts = 2 if epochs == 1 and run.renew is not None else 1
        budget = TimeBudget(end, collective, clock)
        state = self._fit(budget, epochs, run, folder, parts)
        if budget.has_ended:
            return None
        state = {
            name: collective.agreed(value.to(self.model.device)) for name, value in state.items()
        }
        if not all(bool(value.isfinite().all()) for value in state.values()):
            return None
        done = budget.epochs_done / parts
        # Without a time limit, only the module itself can have stopped early, so the training
        # counts as complete.
        return Trained(state, done, planned if math.isfinite(end) else done)

    def _fit(
        self, budget: TimeBudget, epochs: int, run: _TrainingRun, folder: str, parts: int = 1
    ) -> State:
        outer, seed = self.trainer, run.seed

        def copies() -> tuple[LightningModule, Trainer, Any]:
            live = current_state(self.model)
            shared = (
                outer,
                data_module_of(outer),
                *outer.loggers,
                *(source.loader.dataset for source in self.known),
            )
            how: dict[str, Any] = {"shared": shared, "left_out": self.left_out, "rate": run.rate}
            try:
                model = copied_module(self.model, {**live, **run.start}, self.modes, **how)
                loader = self._loader(seed, run.weight, parts)
                trainer = inner_trainer(
                    outer, budget, epochs=epochs * parts, batches=len(loader), folder=folder
                )
            except Exception as error:
                why = f"it or its trainer cannot be copied ({describe_failure(error)})"
                raise CannotTrainError(why) from error
            return model, trainer, loader

        with random_state(), torch.enable_grad():
            # Each rank draws its own dropout and augmentation.
            seed_all((seed + outer.global_rank) % 2**32)
            model, trainer, loader = budget.on_all_ranks(copies)
            data = data_module_of(outer)
            given: dict[str, Any] = {"train_dataloaders": loader}
            if data is not None:
                given = {"datamodule": copied_data_module(data, loader)}
            if run.renew is not None:
                # Several loaders have no weights.
                sampler = loader.sampler if isinstance(loader, DataLoader) else loader
                budget.halfway = partial(_renew_weights, run.renew, sampler)
            budget.on_all_ranks(partial(trainer.fit, model, **given))
        # `eval` merges LoRA weights, as they are merged in the model to repair.
        state = snapshot(budget.on_all_ranks(model.eval))
        del model, trainer, loader, given
        gc.collect()  # large reference cycles
        return state

    def _loader(self, seed: int, weight: Tensor | None = None, n_parts: int = 1) -> Any:
        if len(loaders_in(self.trained_on)) > 1:
            shuffled = partial(self._shuffled, seed=seed, parts=n_parts)
            return combined_like(
                self.trainer, self.trained_on, lambda like: shuffled(like, like.dataset)
            )
        like, parts = self._template_loader(), self._known_datasets()
        data: Dataset[Any] = parts[0] if len(parts) == 1 else ConcatDataset(parts)
        sized = self.trained_on if isinstance(self.trained_on, DataLoader) else like
        how: dict[str, Any] = {"weight": weight, "parts": n_parts, "size": batch_size_of(sized)}
        if self.augment is not None and self.targeted is not None:
            data = MarkedSamples(data, self.targeted)
            how["collate_fn"] = AugmentingCollate(like.collate_fn, self.augment)
        return self._shuffled(like, data, seed, **how)

    def _shuffled(
        self,
        like: DataLoader[Any],
        data: Any,
        seed: int,
        weight: Tensor | None = None,
        parts: int = 1,
        size: int | None = None,
        **how: Any,
    ) -> DataLoader[Any]:
        size, share = (
            size or batch_size_of(like),
            (self.trainer.global_rank, self.trainer.world_size),
        )
        sampler = ShuffledSampler(len(data), seed, *share, weight=weight, parts=parts)
        return loader_like(
            like,
            data,
            batch_size=size,
            sampler=sampler,
            # Batch norm cannot train on one sample.
            drop_last=len(sampler) > size and (like.drop_last or len(sampler) % size == 1),
            generator=torch.Generator().manual_seed(seed + self.trainer.global_rank),
            persistent_workers=like.num_workers > 0,
            **how,
        )

    def _known_datasets(self) -> list[Dataset[Any]]:
        like, parts = self._template_loader(), []
        for source in self.known:
            data = source.loader.dataset
            # Prefer the data set of the training loader, which may augment, for the passed data.
            if source.passed and not source.failed and len(like.dataset) == len(data):  # type: ignore[arg-type]
                data = like.dataset
            whole = source.draws == 1 and len(source.index) == len(data)  # type: ignore[arg-type]
            parts.append(data if whole else Subset(data, source.index.tolist()))
        return parts

    def _template_loader(self) -> DataLoader[Any]:
        loader = self.trained_on
        if (
            isinstance(loader, DataLoader)
            and loader.batch_sampler is not None
            and isinstance(loader.dataset, Sized)
        ):
            return loader
        return self.known[0].loader


@dataclass(frozen=True)
class _TrainingRun:
    seed: int
    start: State
    weight: Tensor | None
    rate: float | None
    renew: Renew | None


def _renew_weights(renew: Renew, sampler: Any, model: LightningModule) -> bool:
    with random_state():
        with eval_mode(model):
            state = snapshot(model)
        weight = renew(state)
    if weight is None:
        return False
    sampler.weight = weight
    return True


class MarkedSamples(Dataset[tuple[Any, bool]]):
    """Data set of pairs: a sample of `data`, and True if the sample is marked. `marked` is a bool
    for each sample.
    """

    def __init__(self, data: Dataset[Any], marked: Tensor) -> None:
        self.data, self.marked = data, marked

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        return self.data[index], bool(self.marked[index])

    def __len__(self) -> int:
        return len(self.marked)


@dataclass(frozen=True)
class AugmentingCollate:
    """Collate function for `MarkedSamples`. A batch has the unmarked samples, then the marked
    samples, augmented.
    """

    collate: Callable[[list[Any]], Any]
    augment: Augment

    def __call__(self, samples: Sequence[tuple[Any, bool]]) -> Any:
        targets = [sample for sample, is_marked in samples if is_marked]
        others = [sample for sample, is_marked in samples if not is_marked]
        if not targets:
            return self.collate(others)
        given = self.collate(targets)
        try:
            changed = self.augment(given)
        except Exception as error:
            problem = f"`augment` raised {type(error).__name__}: {first_line(error)}."
            hint = "it gets a batch of targets as the data loader returns it."
            raise ConfigurationError(problem, hint) from error
        return changed if not others else _concatenate_batches(self.collate(others), changed)


def _concatenate_batches(one: Any, other: Any) -> Any:
    def is_list(x: Any) -> bool:
        return isinstance(x, list) and not any(isinstance(leaf, Tensor) for leaf in x)

    def join(a: Any, b: Any) -> Any:
        return (
            torch.cat([a, b.to(a)])
            if isinstance(a, Tensor)
            else a + b
            if isinstance(a, list)
            else a
        )

    first, spec = pytree.tree_flatten(one, is_leaf=is_list)
    second, other_spec = pytree.tree_flatten(other, is_leaf=is_list)
    cause: Exception | None = None
    problem = f"it returned a batch of {len(second)} parts, but other batches have {len(first)}"
    if spec == other_spec:
        try:
            return pytree.tree_unflatten(
                [join(a, b) for a, b in zip(first, second, strict=True)], spec
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            cause, problem = error, first_line(error)
    hint = "return a batch of the same form; sizes of tensors may differ only in the number of samples."
    raise ConfigurationError(f"`augment`: {problem}.", hint) from cause


class ShuffledSampler(Sampler[int]):
    """Sampler that draws `n // parts` of `n` samples in random order, and divides them equally
    among
    the ranks.

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
        parts: int = 1,
    ) -> None:
        self._rank, self._world_size, self.weight = rank, world_size, weight
        self._all, self._n = n, max(1, n // parts)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self._all, generator=self.generator)
        if self.weight is not None and bool((self.weight != self.weight[0]).any()):
            order = self._draw_weighted(order, self.weight)
        yield from order[: self._n][self._rank :: self._world_size][: len(self)].tolist()

    def _draw_weighted(self, order: Tensor, weight: Tensor) -> Tensor:
        # A sample of weight 2.3 is drawn twice, and with a chance of 0.3 a third time.
        allowed = order[weight[order] > 0]
        weight = (weight / weight.mean())[order]
        chance = torch.rand(len(order), generator=self.generator, dtype=torch.float64)
        drawn = order.repeat_interleave((weight.floor() + (chance < weight.frac())).long())
        drawn = drawn[torch.randperm(len(drawn), generator=self.generator)]
        if len(drawn) < self._n:
            drawn = torch.cat([drawn, allowed.repeat(-(-self._n // max(1, len(allowed))))])
        return drawn[: self._n]

    def __len__(self) -> int:
        return self._n // self._world_size


def _cannot_collate(parts: Sequence[Dataset[Any]], collate: Any) -> str:
    what = "its samples cannot be read"
    try:
        samples = [part[0] for part in parts]
        what = "its samples and the failed ones cannot be put into one batch"
        for batch in (samples, samples[::-1]):
            collate(batch)
    except Exception as error:
        return f"{what} ({describe_failure(error)})"
    return ""
