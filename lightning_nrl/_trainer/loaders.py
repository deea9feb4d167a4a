"""Reads the user's data loaders for a repair: in order, each sample once, as validation reads it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import get_world_size, is_initialized
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer
from lightning_nrl._trainer.lightning.private_parts import prepare_batch, sampler_of
from lightning_nrl._utils.preserve import CpuRandomState, mixed_seed, random_state, seed_all, seed_cpu
from lightning_nrl._utils.registry import import_function
from lightning_nrl.data.adapters import adapter_hint, as_adapter, bind_adapter, describe, unpack
from lightning_nrl.data.batch import Adapter, Batch
from lightning_nrl.data.sample_identity import base_samples
from lightning_nrl.errors import ConfigurationError, RepairError


class SeededDataset(Dataset[Any]):
    """Another data set, read with random numbers that depend on a seed and on the position of the sample alone.

    Of `n` samples, position `i + k * n` is draw `k` of sample `i`. Until a sample draws from the global generators of
    torch (on the CPU), numpy or `random` (`draws`), batches are read without seeds, and once more if one does.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed, self.draws = dataset, seed, False

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, index: Sequence[int]) -> list[Any]:
        """Torch's data loaders read batches by this."""
        found, n, samples = CpuRandomState.current(), len(self), list[Any]()
        if not self.draws:
            places = [i % n for i in index]
            whole: Callable[[list[int]], list[Any]] | None = getattr(self.dataset, "__getitems__", None)
            samples = [self.dataset[i] for i in places] if whole is None else whole(places)
            if found.is_current():
                return samples
            self.draws, samples = True, []
        try:
            for i in index:
                seed_cpu(mixed_seed(self.seed, i))
                samples.append(self.dataset[i % n])
            return samples
        finally:
            found.restore()


def init_worker(function: Callable[[int], None] | None, worker_id: int) -> None:
    """Starts a worker whose `get_worker_info` tells of the user's own data set."""
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, SeededDataset):
        # torch locks the attributes of this object.
        object.__setattr__(info, "dataset", info.dataset.dataset)
    if function is not None:
        function(worker_id)


SPLITS = ("train", "val", "repair", "test")


@dataclass(frozen=True)
class LoaderSource:
    """A split read through a data loader, this rank's share of it (see `lightning_nrl.data.batch.Source`)."""

    split: str
    passed: bool
    failed: bool
    index: Tensor  # data-set positions of all its samples, over all ranks; of several draws one after another
    positions: Tensor  # this rank's places in that order
    loader: DataLoader[Any]  # the user's, with the data set as the user made it
    samples: SeededDataset  # what is read: that data set, or a view of it, each sample with one draw
    transfer: Callable[[Any], Any]  # brings a raw batch to the device, as Lightning does in validation
    adapter: Adapter = unpack
    seed: int = 0  # what a model that draws random numbers is seeded with at every pass
    draws: int = 1  # how often each sample is in the split, each time with random numbers of its own

    @property
    def batch_size(self) -> int:
        return batch_size_of(self.loader)

    @property
    def identity(self) -> Tensor:
        """`n x 2`, the data set and the place of each sample, seen through subsets and unions."""
        return base_samples(self.loader.dataset, self.index)

    @property
    def has_validation_view(self) -> bool:
        """True if the data set is read with the transform of the validation data."""
        return self.samples.dataset is not self.loader.dataset

    def first_batch(self) -> Any:
        """The first raw batch of the split on the device, the same on every rank; seeds the global generators."""
        seed_all(self.seed)
        first = torch.arange(len(self.index))[: self.batch_size]
        raw = self.transfer(self.loader.collate_fn(self.samples.__getitems__(self._codes(first))))
        self._taken_apart(raw)  # says what does not fit
        return raw

    def __iter__(self) -> Iterator[Batch]:
        seed_all(self.seed)
        at = 0
        for raw in self._read(batch_size=self.batch_size, sampler=self._codes(self.positions)):
            raw = self.transfer(raw)
            args, kwargs, target, n = self._taken_apart(raw)
            expected = min(self.batch_size, len(self.positions) - at)
            if n != expected:
                raise ConfigurationError(
                    f"`{self.split}` data: a batch of {expected} samples came with {n} targets.\n{describe(raw)}",
                    f"the target's first dimension must count samples; {adapter_hint(raw)}",
                )
            yield Batch(args, target, self.positions[at : at + n], kwargs, raw)
            at += n

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Reads chosen samples, the same as in an ordinary pass."""
        chosen = [self._codes(position) for position in batches]
        for position, raw in zip(batches, self._read(batch_sampler=chosen), strict=True):
            raw = self.transfer(raw)
            args, kwargs, target = self.adapter(raw)
            yield Batch(args, target, position, kwargs, raw)

    def _taken_apart(self, raw: Any) -> tuple[tuple[Any, ...], Mapping[str, Any], Any, int]:
        try:
            args, kwargs, target = self.adapter(raw)
            return args, kwargs, target, length_of(target)
        except RepairError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"`adapter` raised {type(error).__name__} on `{self.split}` data: {error}\n{describe(raw)}",
                adapter_hint(raw),
            ) from error

    def with_draws(self, draws: int) -> LoaderSource:
        """Returns the split with several draws of each sample; each draw counts as a sample."""
        n = len(self.index)
        positions = torch.cat([self.positions + draw * n for draw in range(draws)])
        return replace(self, index=self.index.repeat(draws), positions=positions, draws=draws)

    def without(self, left_out: Sequence[int]) -> LoaderSource:
        kept = ~torch.isin(self.index, torch.tensor(left_out, dtype=torch.int64))
        place = kept.cumsum(0) - 1
        return replace(self, index=self.index[kept], positions=place[self.positions[kept[self.positions]]])

    def _codes(self, positions: Tensor) -> list[int]:
        """Some places as `SeededDataset` numbers samples and draws."""
        draw = positions // max(1, len(self.index) // self.draws)
        return (self.index[positions] + draw * len(self.samples)).tolist()

    def _read(self, **batches: Any) -> DataLoader[Any]:
        own = self.loader
        init = partial(init_worker, own.worker_init_fn) if own.num_workers else None
        generator = torch.Generator().manual_seed(self.seed)
        return loader_like(own, self.samples, worker_init_fn=init, generator=generator, **batches)


def make_source(
    loader: Any,
    split: str,
    *,
    trainer: Trainer,
    model: LightningModule,
    passed: bool = False,
    failed: bool = False,
    adapter: Adapter = unpack,
    seed: int = 0,
    limit: int | None = None,
    whole: bool = False,
) -> LoaderSource:
    """A source that each rank reads its own samples of once, in order, nothing dropped or padded.

    `limit`: the number of batches to read, for `fast_dev_run`; `whole`: each rank reads all samples.
    """
    loader = check_loader(loader, split)
    index = sample_index(loader)
    if limit is not None:
        index = index[: limit * batch_size_of(loader)]
    positions = torch.arange(len(index))
    if not whole:
        positions = positions[trainer.global_rank :: trainer.world_size]
    transfer = partial(prepare_batch, trainer, model)
    samples = SeededDataset(loader.dataset, seed)
    adapter = bind_adapter(adapter, model)
    return LoaderSource(split, passed, failed, index, positions, loader, samples, transfer, adapter, seed)


def batch_size_of(loader: DataLoader[Any]) -> int:
    """The batch size of a loader; an average, where a batch sampler of the user's own does not say."""
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    said: int | None = loader.batch_size or getattr(sampler, "batch_size", None)
    if said or not isinstance(sampler, Sized) or not len(sampler):
        return said or 1
    return -(-len(sample_index(loader)) // len(sampler))


def loader_like(loader: DataLoader[Any], dataset: Dataset[Any] | None = None, **arguments: Any) -> DataLoader[Any]:
    """A loader of other samples that reads and collates as a loader does, by as many workers."""
    if loader.num_workers:
        for name in ("num_workers", "prefetch_factor", "multiprocessing_context"):
            arguments[name] = getattr(loader, name)
    return DataLoader(
        loader.dataset if dataset is None else dataset,
        pin_memory=loader.pin_memory and torch.cuda.is_available(),
        **{"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn, **arguments},
    )


def split_and_loader(name: str) -> tuple[str, str]:
    """`val:1` as the split and the number or key of one of its loaders."""
    split, _, which = name.partition(":")
    return split, which


def loaders_in(given: Any) -> Mapping[str, Any]:
    """The loaders in a list, a mapping or a `CombinedLoader`, by number or key; a single one is number 0."""
    given = getattr(given, "iterables", given)
    if isinstance(given, Mapping):
        return {str(key): loader for key, loader in given.items()}
    return {str(i): loader for i, loader in enumerate(given if isinstance(given, (list, tuple)) else [given])}


def check_loader(loader: Any, split: str, instead: str = "") -> DataLoader[Any]:
    """The one data loader in what the user gave; refuses what cannot be read by index, with the hint `instead`."""

    def refused(problem: str, hint: str) -> ConfigurationError:
        return ConfigurationError(f"`{split}` data: {problem}.", instead or hint)

    several = loaders_in(loader)
    if len(several) != 1:
        names = f", such as '{split}:{next(iter(several))}'" if split in SPLITS and several else ""
        raise refused(f"{len(several)} data loaders at once", f"name one of them{names}, or pass a single DataLoader.")
    (loader,) = several.values()
    if not isinstance(loader, DataLoader):
        raise refused(f"found {type(loader).__name__}, not a DataLoader", "wrap the data set in a DataLoader.")
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        found = f"{type(loader.dataset).__name__} is iterable, its samples have no stable index"
        raise refused(found, "give map-style data: `data=DataOptions(passed=loader, failed=other)`.")
    if loader.batch_sampler is None:
        found = f"its {type(loader).__name__} asks the data set for whole batches (torch's `batch_size=None`)"
        hint = "read samples, `DataLoader(loader.dataset, batch_size=64, collate_fn=...)`, as `data=DataOptions(...)`."
        raise refused(found, hint)
    if len(loader.dataset) == 0:
        raise refused("the data set is empty", "name another split, or pass a DataLoader with samples.")
    return loader


def check_data(
    argument: str, value: str | DataLoader[Any] | None, names: Sequence[str] = SPLITS, *, optional: bool = False
) -> str | DataLoader[Any] | None:
    """The name of a split, the one data loader in what was given, or None; refuses all else."""
    known = (*names, *(f"{name}:{split_and_loader(value)[1]}" for name in SPLITS)) if isinstance(value, str) else names
    if (isinstance(value, str) and value not in known) or (value is None and not optional):
        raise ConfigurationError(
            f"`{argument}={value!r}` is no split.", f"write one of {list(names)} or pass a DataLoader."
        )
    return value if isinstance(value, str) or value is None else check_loader(value, argument)


def sample_index(loader: DataLoader[Any]) -> Tensor:
    """Positions of the samples of a loader, ascending: those that its sampler is over, else the whole data set.

    A sampler of the user's own is over a subset if it draws the same one twice; one with weights, over those above 0.
    """
    n = len(loader.dataset)  # type: ignore[arg-type]
    outer, sampler = sampler_of(loader)
    indices = getattr(sampler, "indices", None)
    if indices is not None and not isinstance(sampler, SequentialSampler):
        return torch.as_tensor(sorted({int(i) for i in indices}), dtype=torch.int64)
    if isinstance(sampler, WeightedRandomSampler) and len(sampler.weights) == n:
        return sampler.weights.cpu().nonzero().flatten()
    makes_batches = outer is sampler and type(loader.batch_sampler) is not BatchSampler
    own = loader.batch_sampler if makes_batches else sampler
    # Over several ranks each would draw its own share.
    shared = isinstance(own, DistributedSampler) or (is_initialized() and get_world_size() > 1)
    if shared or isinstance(own, (SequentialSampler, RandomSampler, WeightedRandomSampler)):
        return torch.arange(n)
    with random_state():
        first, second = _drawn(own, n), _drawn(own, n)
    return torch.tensor(sorted(first)) if first and first == second else torch.arange(n)


def _drawn(sampler: Any, n: int) -> set[int] | None:
    """The positions that a copy of a sampler draws; None where it cannot be copied, or draws what is no position."""
    found: set[int] = set()
    try:
        # One that never ends draws no more than as many batches as there are samples.
        for item in islice(copy.deepcopy(sampler), n):
            found |= {int(i) for i in item} if isinstance(item, Iterable) else {int(item)}
    except Exception:
        return None
    return found if all(0 <= i < n for i in found) else None


def parse_adapter(adapter: str | Adapter | None) -> Adapter:
    """An adapter from a function or its address, by default `unpack`."""
    return unpack if adapter is None else as_adapter(import_function("adapter", adapter))


def length_of(target: Any) -> int:
    """The number of samples of a target."""
    if isinstance(target, Mapping):
        target = next(iter(target.values()))
    if isinstance(target, Sequence) and target and isinstance(target[0], Tensor):
        target = target[0]
    return len(target)
