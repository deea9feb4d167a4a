"""Sources that read each sample of the user's data loaders once and in order, as Lightning's
validation does.
"""

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
from lightning_nrl._utils.preserve import (
    CpuRandomState,
    mixed_seed,
    random_state,
    seed_all,
    seed_cpu,
)
from lightning_nrl._utils.registry import import_function
from lightning_nrl.data.adapters import adapter_hint, as_adapter, bind_adapter, describe, unpack
from lightning_nrl.data.batch import Adapter, Batch
from lightning_nrl.data.sample_identity import base_samples
from lightning_nrl.errors import ConfigurationError, RepairError


class SeededDataset(Dataset[Any]):
    """Wrapper of a data set in which random numbers depend only on a seed and on the position of
    the
    sample.

    With `n` samples, position `i + k * n` is sample `i` with its k-th set of random numbers.
    Nothing is seeded until a sample draws from the global generators of torch (on the CPU), numpy
    or `random`. Then `draws` becomes True, and the current batch is read again.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed, self.draws = dataset, seed, False

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, index: Sequence[int]) -> list[Any]:
        found, n, samples = CpuRandomState.current(), len(self), list[Any]()
        if not self.draws:
            places = [i % n for i in index]
            whole: Callable[[list[int]], list[Any]] | None = getattr(
                self.dataset, "__getitems__", None
            )
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
    """Initialises a loader's worker: puts the user's own data set into `get_worker_info()`, then
    calls `function`.
    """
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, SeededDataset):
        # torch locks the attributes of this object.
        object.__setattr__(info, "dataset", info.dataset.dataset)
    if function is not None:
        function(worker_id)


SPLITS = ("train", "val", "repair", "test")


@dataclass(frozen=True)
class LoaderSource:
    """This rank's share of a split, read through a data loader (see
    `lightning_nrl.data.batch.Source`).
    """

    split: str
    passed: bool  # True: the search may score right samples of this split
    failed: bool  # True: failures of this split may be repaired
    index: Tensor  # data-set positions of the samples of all ranks, repeated for each draw
    positions: Tensor  # this rank's rows of `index`
    loader: DataLoader[Any]  # the user's own
    samples: SeededDataset  # the loader's data set, possibly with the validation transform
    transfer: Callable[
        [Any], Any
    ]  # moves a raw batch to the device, as Lightning does in validation
    adapter: Adapter = unpack
    seed: int = 0  # seed of the model's random numbers, set at the start of every pass
    draws: int = 1  # how often each sample is read, each time with other random numbers

    @property
    def batch_size(self) -> int:
        return batch_size_of(self.loader)

    @property
    def identity(self) -> Tensor:
        """For each of `n` samples, the `id` of its innermost data set and its position in there: `n
        x 2` int64.
        """
        return base_samples(self.loader.dataset, self.index)

    @property
    def has_validation_view(self) -> bool:
        """True if samples are read with the `transform` of the validation data instead of their own
        transform.
        """
        return self.samples.dataset is not self.loader.dataset

    def first_batch(self) -> Any:
        """Returns, on every rank, the first raw batch of the split on the device. Seeds the global
        generators.
        """
        seed_all(self.seed)
        first = torch.arange(len(self.index))[: self.batch_size]
        raw = self.transfer(
            self.loader.collate_fn(self.samples.__getitems__(self._draw_indices(first)))
        )
        self._unpack(raw)  # raises if the adapter does not fit
        return raw

    def __iter__(self) -> Iterator[Batch]:
        seed_all(self.seed)
        at = 0
        for raw in self._read(
            batch_size=self.batch_size, sampler=self._draw_indices(self.positions)
        ):
            raw = self.transfer(raw)
            args, kwargs, target, n = self._unpack(raw)
            expected = min(self.batch_size, len(self.positions) - at)
            if n != expected:
                problem = f"`{self.split}` data: a batch of {expected} samples came with {n} targets.\n{describe(raw)}"
                hint = f"the target's first dimension must count samples; {adapter_hint(raw)}"
                raise ConfigurationError(problem, hint)
            yield Batch(args, target, self.positions[at : at + n], kwargs, raw)
            at += n

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Yields a batch for each tensor of positions in the split. A sample has the same values in
        every read.
        """
        chosen = [self._draw_indices(position) for position in batches]
        for position, raw in zip(batches, self._read(batch_sampler=chosen), strict=True):
            raw = self.transfer(raw)
            args, kwargs, target = self.adapter(raw)
            yield Batch(args, target, position, kwargs, raw)

    def _unpack(self, raw: Any) -> tuple[tuple[Any, ...], Mapping[str, Any], Any, int]:
        try:
            args, kwargs, target = self.adapter(raw)
            return args, kwargs, target, length_of(target)
        except RepairError:
            raise
        except Exception as error:
            problem = f"`adapter` raised {type(error).__name__} on `{self.split}` data: {error}\n{describe(raw)}"
            raise ConfigurationError(problem, adapter_hint(raw)) from error

    def with_draws(self, draws: int) -> LoaderSource:
        """Returns a source that reads each sample `draws` times, with other random numbers, and
        counts each read.
        """
        n = len(self.index)
        positions = torch.cat([self.positions + draw * n for draw in range(draws)])
        return replace(self, index=self.index.repeat(draws), positions=positions, draws=draws)

    def without(self, left_out: Sequence[int]) -> LoaderSource:
        kept = ~torch.isin(self.index, torch.tensor(left_out, dtype=torch.int64))
        place = kept.cumsum(0) - 1
        return replace(
            self, index=self.index[kept], positions=place[self.positions[kept[self.positions]]]
        )

    def _draw_indices(self, positions: Tensor) -> list[int]:
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
    """Returns a source that shares the samples among ranks, in order, without dropping or repeating
    a
    sample.

    `limit` is the largest number of batches, as for `fast_dev_run`. With `whole`, each rank reads
    all samples.
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
    return LoaderSource(
        split, passed, failed, index, positions, loader, samples, transfer, adapter, seed
    )


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Returns the batch size of a loader, or its average batch size if a custom batch sampler has
    no `batch_size`.
    """
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    said: int | None = loader.batch_size or getattr(sampler, "batch_size", None)
    if said or not isinstance(sampler, Sized) or not len(sampler):
        return said or 1
    return -(-len(sample_index(loader)) // len(sampler))


def loader_like(
    loader: DataLoader[Any], dataset: Dataset[Any] | None = None, **arguments: Any
) -> DataLoader[Any]:
    """Returns a loader with the collate function, workers and pinning of `loader`. `arguments` go
    to `DataLoader`.
    """
    if loader.num_workers:
        for name in ("num_workers", "prefetch_factor", "multiprocessing_context"):
            arguments[name] = getattr(loader, name)
    return DataLoader(
        loader.dataset if dataset is None else dataset,
        pin_memory=loader.pin_memory and torch.cuda.is_available(),
        **{"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn, **arguments},
    )


def split_and_loader(name: str) -> tuple[str, str]:
    """Splits a name such as `val:1` into the split `val` and the number or key `1`, which is empty
    for `val` alone.
    """
    split, _, which = name.partition(":")
    return split, which


def loaders_in(given: Any) -> Mapping[str, Any]:
    """Returns the loaders of a list, mapping or `CombinedLoader` by number or key (text). A single
    loader is at `0`.
    """
    given = getattr(given, "iterables", given)
    if isinstance(given, Mapping):
        return {str(key): loader for key, loader in given.items()}
    return {
        str(i): loader
        for i, loader in enumerate(given if isinstance(given, (list, tuple)) else [given])
    }


def check_loader(loader: Any, split: str, instead: str = "") -> DataLoader[Any]:
    """Returns the only loader in `loader`; refuses data that cannot be read by index. `instead`
    replaces the hint.
    """

    def refused(problem: str, hint: str) -> ConfigurationError:
        return ConfigurationError(f"`{split}` data: {problem}.", instead or hint)

    several = loaders_in(loader)
    if len(several) != 1:
        names = f", such as '{split}:{next(iter(several))}'" if split in SPLITS and several else ""
        raise refused(
            f"{len(several)} data loaders at once",
            f"name one of them{names}, or pass a single DataLoader.",
        )
    (loader,) = several.values()
    if not isinstance(loader, DataLoader):
        raise refused(
            f"found {type(loader).__name__}, not a DataLoader", "wrap the data set in a DataLoader."
        )
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        found = f"{type(loader.dataset).__name__} is iterable, so its samples have no index"
        raise refused(
            found, "give map-style data: `data=DataOptions(passed=loader, failed=other)`."
        )
    if loader.batch_sampler is None:
        found = f"its {type(loader).__name__} asks the data set for whole batches (torch's `batch_size=None`)"
        hint = "give `DataOptions` a loader of samples: `DataLoader(loader.dataset, batch_size=64, collate_fn=...)`."
        raise refused(found, hint)
    if len(loader.dataset) == 0:
        raise refused(
            "the data set is empty", "name another split, or pass a DataLoader with samples."
        )
    return loader


def check_data(
    argument: str,
    value: str | DataLoader[Any] | None,
    names: Sequence[str] = SPLITS,
    *,
    optional: bool = False,
) -> str | DataLoader[Any] | None:
    """Returns the name of a split, a data loader, or None if `optional`; refuses any other value."""
    known = (
        (*names, *(f"{name}:{split_and_loader(value)[1]}" for name in SPLITS))
        if isinstance(value, str)
        else names
    )
    if (isinstance(value, str) and value not in known) or (value is None and not optional):
        hint = f"write one of {list(names)} or pass a DataLoader."
        raise ConfigurationError(f"`{argument}={value!r}` is no split.", hint)
    return value if isinstance(value, str) or value is None else check_loader(value, argument)


def sample_index(loader: DataLoader[Any]) -> Tensor:
    """Returns the data-set positions that a loader's sampler can draw, in ascending order.

    A weighted sampler can draw the samples of weight above 0. A custom sampler is run twice. If
    both runs draw the same positions, these positions are returned. Otherwise, and for any other
    sampler, all positions are returned.
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
    # With several ranks, a sampler may draw only the share of this rank.
    shared = isinstance(own, DistributedSampler) or (is_initialized() and get_world_size() > 1)
    if shared or isinstance(own, (SequentialSampler, RandomSampler, WeightedRandomSampler)):
        return torch.arange(n)
    with random_state():
        first, second = _drawn_positions(own, n), _drawn_positions(own, n)
    return torch.tensor(sorted(first)) if first and first == second else torch.arange(n)


def _drawn_positions(sampler: Any, n: int) -> set[int] | None:
    found: set[int] = set()
    try:
        # The sampler is copied, since its state must not change; it may be endless.
        for item in islice(copy.deepcopy(sampler), n):
            found |= {int(i) for i in item} if isinstance(item, Iterable) else {int(item)}
    except Exception:
        return None
    return found if all(0 <= i < n for i in found) else None


def parse_adapter(adapter: str | Adapter | None) -> Adapter:
    """Returns an adapter, given as a function or as its address. None means `unpack`."""
    return unpack if adapter is None else as_adapter(import_function("adapter", adapter))


def length_of(target: Any) -> int:
    """Returns the number of samples in the target of a batch, which may be a mapping or a list of
    tensors.
    """
    if isinstance(target, Mapping):
        target = next(iter(target.values()))
    if isinstance(target, Sequence) and target and isinstance(target[0], Tensor):
        target = target[0]
    return len(target)
