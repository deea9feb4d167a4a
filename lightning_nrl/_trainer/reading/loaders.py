"""Sources that read each sample of a data loader once and in order, as Lightning's validation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeAlias, cast

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
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_nrl._trainer.lightning.packages import LightningModule, Trainer
from lightning_nrl._trainer.lightning.private_parts import (
    Loader,
    Loaders,
    prepare_batch,
    sampler_of,
)
from lightning_nrl._utils.preserve import (
    CpuRandomState,
    mixed_seed,
    random_state,
    seed_all,
    seed_cpu,
)
from lightning_nrl._utils.registry import import_function
from lightning_nrl.data.adapters import adapter_hint, as_adapter, bind_adapter, describe, unpack
from lightning_nrl.data.batch import Adapter, Batch, RawBatch, Unpacked
from lightning_nrl.data.sample_identity import base_samples
from lightning_nrl.errors import ConfigurationError, RepairError, check_kind

AnyDataset: TypeAlias = Dataset[Any]
Sample: TypeAlias = Any
"""What a data set returns for an index."""


class SeededDataset(Dataset[Any]):
    """Wrapper of a data set whose random numbers depend only on a seed and a sample's position.

    With `n` samples, position `i + k * n` is sample `i` with its k-th set of random numbers.
    Nothing is seeded until a sample draws from the global generators of torch (on the CPU), numpy
    or `random`. Then `draws` becomes True, and the current batch is read again.
    """

    def __init__(self, dataset: AnyDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.draws = False

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, i: int) -> Sample:
        return self.__getitems__([i])[0]

    def __getitems__(self, index: Sequence[int]) -> list[Sample]:
        before = CpuRandomState.current()
        n = len(self)
        if not self.draws:
            samples = read_samples(self.dataset, [i % n for i in index])
            if before.is_current():
                return samples
            self.draws = True
        samples = []
        try:
            for i in index:
                seed_cpu(mixed_seed(self.seed, i))
                samples.append(self.dataset[i % n])
        finally:
            before.restore()
        return samples


def read_samples(dataset: AnyDataset, index: list[int]) -> list[Sample]:
    """Reads several samples at once, as fast as the data set allows."""
    if type(dataset) is Subset:
        return read_samples(dataset.dataset, [dataset.indices[i] for i in index])
    if type(dataset) is TensorDataset and all(map(_has_rows, dataset.tensors)):
        # Four times as fast as sample by sample, which would take most of a pass.
        rows = torch.tensor([int(i) for i in index])  # a subset may have indices of any kind
        return list(zip(*(tensor[rows] for tensor in dataset.tensors), strict=True))
    read_batch = getattr(dataset, "__getitems__", None)
    if read_batch is None:
        return [dataset[i] for i in index]
    return cast(list[Sample], read_batch(index))


def _has_rows(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def init_worker(function: Callable[[int], None] | None, worker_id: int) -> None:
    """Initialises a worker: shows it the user's own data set, then calls `function`."""
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, SeededDataset):
        # torch locks the attributes of this object.
        object.__setattr__(info, "dataset", info.dataset.dataset)
    if function is not None:
        function(worker_id)


SPLITS = ("train", "val", "repair", "test")


@dataclass(frozen=True)
class LoaderSource:
    """This rank's share of a split, read through a data loader: a `lightning_nrl.data.Source`."""

    split: str
    passed: bool  # True: the search may score right samples of this split
    failed: bool  # True: failures of this split may be repaired
    index: Tensor  # data-set positions of the samples of all ranks, repeated for each draw
    positions: Tensor  # this rank's rows of `index`
    loader: Loader  # the user's own
    samples: SeededDataset  # the loader's data set, possibly with the validation transform
    transfer: Callable[[RawBatch], RawBatch]  # moves a raw batch to the device, as in validation
    adapter: Adapter = unpack
    seed: int = 0  # seed of the model's random numbers, set at the start of every pass
    draws: int = 1  # how often each sample is read, each time with other random numbers

    @property
    def batch_size(self) -> int:
        return batch_size_of(self.loader)

    @property
    def identity(self) -> Tensor:
        """The `id` of each sample's innermost data set and its position there, `n x 2` int64."""
        return base_samples(self.loader.dataset, self.index)

    def first_batch(self) -> RawBatch:
        """Returns, on every rank, the first raw batch on the device; seeds all generators."""
        seed_all(self.seed)
        first = self._draw_indices(torch.arange(len(self.index))[: self.batch_size])
        raw = self.transfer(self.loader.collate_fn(self.samples.__getitems__(first)))
        self._unpack(raw)  # raises if the adapter does not fit
        return raw

    def __iter__(self) -> Iterator[Batch]:
        seed_all(self.seed)
        yield from self.draw(self.positions.split(self.batch_size) if len(self.positions) else ())

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Yields a batch for each tensor of positions. Samples are the same in every read."""
        for position, raw in self._read(batches):
            (args, kwargs, target), n = self._unpack(raw)
            if n != len(position):
                raise ConfigurationError(
                    f"`{self.split}` data: a batch of {len(position)} samples came with {n} "
                    f"targets.\n{describe(raw)}",
                    f"the target's first dimension must count samples; {adapter_hint(raw)}",
                )
            yield Batch(args, target, position, kwargs, raw)

    def _read(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, RawBatch]]:
        loader = loader_like(
            self.loader,
            self.samples,
            batch_sampler=map(self._draw_indices, batches),
            worker_init_fn=partial(init_worker, self.loader.worker_init_fn),
            generator=torch.Generator().manual_seed(self.seed),
        )
        for position, raw in zip(batches, loader, strict=True):
            yield position, self.transfer(raw)

    def _unpack(self, raw: RawBatch) -> tuple[Unpacked, int]:
        try:
            unpacked = self.adapter(raw)
            return unpacked, length_of(unpacked[2])
        except RepairError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"`adapter` raised {type(error).__name__} on `{self.split}` data: {error}\n"
                f"{describe(raw)}",
                adapter_hint(raw),
            ) from error

    @property
    def n_left_out(self) -> int:
        """Number of samples that the loader can draw and a limit leaves out."""
        return len(sample_index(self.loader)) - len(self.index)

    def pieces(self) -> Iterator[LoaderSource]:
        """Yields parts that can be read repeatedly. The ids of a stream count its samples."""
        yield self

    def with_draws(self, draws: int) -> LoaderSource:
        """Returns a source that reads and counts each sample `draws` times, each differently."""
        n = len(self.index)
        positions = torch.cat([self.positions + draw * n for draw in range(draws)])
        return replace(self, index=self.index.repeat(draws), positions=positions, draws=draws)

    def without(self, left_out: Sequence[int]) -> LoaderSource:
        kept = ~torch.isin(self.index, torch.tensor(left_out, dtype=torch.int64))
        place = kept.cumsum(0) - 1
        positions = place[self.positions[kept[self.positions]]]
        return replace(self, index=self.index[kept], positions=positions)

    def _draw_indices(self, positions: Tensor) -> list[int]:
        draw = positions // max(1, len(self.index) // self.draws)
        return (self.index[positions] + draw * len(self.samples)).tolist()


PIECE_SIZE = 16  # batches of a stream that are kept in memory, so that two models can read them


@dataclass(frozen=True)
class StreamSource(LoaderSource):
    """Data without an index, such as an `IterableDataset`, or one of their `pieces`."""

    limit: int | None = None  # largest number of batches
    batches: Sequence[tuple[Tensor, RawBatch]] = ()  # of a piece, with positions
    batch_size = 1
    n_left_out = 0  # it is unknown how many there are

    def first_batch(self) -> RawBatch:
        [piece] = replace(self, limit=1).pieces()
        return piece.batches[0][1]

    def pieces(self) -> Iterator[StreamSource]:
        seed_all(self.seed)
        start = 0
        batches = map(self.transfer, islice(self.loader, self.limit))
        while piece := list(islice(batches, PIECE_SIZE)):
            sizes = [self._unpack(raw)[1] for raw in piece]
            positions = torch.arange(sum(sizes))
            numbered = list(zip(positions.split(sizes), piece, strict=True))
            yield replace(self, index=start + positions, positions=positions, batches=numbered)
            start += len(positions)
        if not start:
            raise ConfigurationError(
                f"`{self.split}` data are empty.",
                "give data with samples that can be read more than once.",
            )

    def _read(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, RawBatch]]:
        for position, raw in self.batches:
            yield position, copy.deepcopy(raw)  # a forward may write into it


def pieces_of(sources: Sequence[LoaderSource]) -> Iterator[Sequence[LoaderSource]]:
    """Yields all sources at once, or one part after the other if one of them is a stream."""
    if not any(isinstance(source, StreamSource) for source in sources):
        yield sources
        return
    for source in sources:
        for piece in source.pieces():
            yield [piece]


def make_source(
    loader: Loaders,
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
    streams: bool = False,
) -> LoaderSource:
    """Returns a source that shares the samples among ranks, each sample once and in order.

    `limit` is the largest number of batches, as for `fast_dev_run`. With `whole`, each rank reads
    all samples. With `streams`, data without an index give a `StreamSource`.
    """
    make: Callable[..., LoaderSource] = LoaderSource
    if streams and isinstance(loader, DataLoader) and _has_no_index(loader):
        check_one_rank(trainer, split)
        make = partial(StreamSource, limit=limit)
        index = torch.arange(0)
    else:
        loader = check_loader(loader, split)
        index = sample_index(loader)
        if limit is not None:
            index = index[: limit * batch_size_of(loader)]
    positions = torch.arange(len(index))
    if torch.equal(positions, index):
        positions = index  # to hold them once
    if not whole:
        positions = positions[trainer.global_rank :: trainer.world_size]
    return make(
        split,
        passed,
        failed,
        index,
        positions,
        loader,
        SeededDataset(loader.dataset, seed),
        partial(prepare_batch, trainer, model),
        bind_adapter(adapter, model),
        seed,
    )


def check_one_rank(trainer: Trainer, split: str) -> None:
    if trainer.world_size > 1:
        raise ConfigurationError(
            f"`{split}` data have no index, so several ranks cannot share them.",
            "give a DataLoader over map-style data with a `batch_size`, or use one device.",
        )


def batch_size_of(loader: Loader) -> int:
    """Returns the batch size, or the average of a batch sampler without a `batch_size`."""
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    size = loader.batch_size or getattr(sampler, "batch_size", None)
    if size:
        return int(size)
    if isinstance(sampler, Sized) and len(sampler):
        return -(-len(sample_index(loader)) // len(sampler))
    return 1


def check_loaders(loaders: Mapping[str, Loaders] | None) -> None:
    fits = loaders is None or (isinstance(loaders, Mapping) and bool(loaders))
    example = "loaders={'night': DataLoader(...)}"
    check_kind("loaders", loaders, fits, "mapping of data loaders", example)


def loader_like(loader: Loader, dataset: AnyDataset, **arguments: Any) -> Loader:
    """Returns a loader with the collate function, workers and pinning of `loader`.

    `arguments` go to `DataLoader`.
    """
    shared = {
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
        "pin_memory": loader.pin_memory and torch.cuda.is_available(),
        "num_workers": loader.num_workers,
        "prefetch_factor": loader.prefetch_factor,
        "multiprocessing_context": loader.multiprocessing_context,
    }
    return DataLoader(dataset, **(shared | arguments))


def split_and_loader(name: str) -> tuple[str, str]:
    """Splits a name such as `val:1` into the split `val` and the number or key `1`, or ``."""
    split, _, loader = name.partition(":")
    return split, loader


def loaders_in(data: Loaders) -> Mapping[str, Loaders]:
    """Returns the loaders of a list, mapping or `CombinedLoader` by number or key, as text.

    A single loader is at `0`.
    """
    loaders = getattr(data, "iterables", data)
    if isinstance(loaders, Mapping):
        return {str(key): loader for key, loader in loaders.items()}
    if not isinstance(loaders, (list, tuple)):
        loaders = [loaders]
    return {str(i): loader for i, loader in enumerate(loaders)}


def is_stream(loader: Loader) -> bool:
    return isinstance(loader.dataset, IterableDataset)


def _has_no_index(loader: Loader) -> bool:
    return (
        is_stream(loader) or not isinstance(loader.dataset, Sized) or loader.batch_sampler is None
    )


def check_loader(data: Loaders, split: str, hint: str = "", *, streams: bool = False) -> Loader:
    """Returns the only loader in `data`; refuses data that cannot be read by index.

    `hint` replaces the hint of the error. With `streams`, streams of samples are accepted.
    """
    loaders = loaders_in(data)
    name, loader = next(iter(loaders.items()), ("", None))
    if len(loaders) != 1:
        problem = f"{len(loaders)} data loaders at once"
        example = f", such as '{split}:{name}'" if split in SPLITS and name else ""
        advice = f"name one of them{example}, or pass a single DataLoader."
    elif not isinstance(loader, DataLoader):
        problem = f"found {type(loader).__name__}, not a DataLoader"
        advice = _give_instead("a DataLoader", split)
    elif is_stream(loader) and streams:
        if loader.batch_sampler is not None:
            return loader
        problem = (
            f"{type(loader.dataset).__name__} yields whole batches (torch's `batch_size=None`)"
        )
        advice = (
            "give `DataOptions` a loader over the stream of single samples: `DataLoader(stream, "
            "batch_size=64, collate_fn=...)`."
        )
    elif is_stream(loader) or not isinstance(loader.dataset, Sized):
        problem = f"{type(loader.dataset).__name__} is iterable, so its samples have no index"
        advice = _give_instead("a DataLoader over map-style data", split)
    elif loader.batch_sampler is None:
        problem = (
            f"its {type(loader).__name__} asks the data set for whole batches (torch's "
            "`batch_size=None`)"
        )
        advice = (
            "give `DataOptions` a loader of samples: `DataLoader(loader.dataset, batch_size=64, "
            "collate_fn=...)`."
        )
    elif len(loader.dataset) == 0:
        problem = "the data set is empty"
        advice = "name another split, or pass a DataLoader with samples."
    else:
        return loader
    raise ConfigurationError(f"`{split}` data: {problem}.", hint or advice)


def _give_instead(kind: str, split: str) -> str:
    advice = f"give the same samples in {kind}"
    name, _ = split_and_loader(split)
    if name == "test":
        return f"{advice}: `unseen=loader`."
    if name in SPLITS:
        return f"{advice}: `data=DataOptions(passed=loader, failed=other)`."
    return f"{advice}."


def check_data(
    argument: str,
    value: str | Loader | None,
    names: Sequence[str] = SPLITS,
    *,
    optional: bool = False,
) -> str | Loader | None:
    """Returns the name of a split, a data loader, or None if `optional`; refuses anything else."""
    if isinstance(value, str):
        split, loader = split_and_loader(value)
        if value in names or (split in SPLITS and value == f"{split}:{loader}"):
            return value
    elif value is not None:
        return check_loader(value, argument, streams=True)
    elif optional:
        return None
    hint = f"write one of {list(names)} or pass a DataLoader."
    raise ConfigurationError(f"`{argument}={value!r}` is no split.", hint)


DRAWING_ALL = (DistributedSampler, SequentialSampler, RandomSampler, WeightedRandomSampler)
"""Samplers that can draw all samples."""


def sample_index(loader: Loader) -> Tensor:
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
    if outer is sampler and type(loader.batch_sampler) is not BatchSampler:
        sampler = loader.batch_sampler  # makes batches in its own way
    # With several ranks, a sampler may draw only the share of this rank.
    if isinstance(sampler, DRAWING_ALL) or (is_initialized() and get_world_size() > 1):
        return torch.arange(n)
    with random_state():
        drawn = _drawn_positions(sampler, n)
        if drawn and drawn == _drawn_positions(sampler, n):
            return torch.tensor(sorted(drawn))
    return torch.arange(n)


def _drawn_positions(sampler: Any, n: int) -> set[int]:
    positions = set()
    try:
        # The sampler is copied, since its state must not change; it may be endless.
        for item in islice(copy.deepcopy(sampler), n):
            positions |= {int(i) for i in item} if isinstance(item, Iterable) else {int(item)}
    except Exception:
        return set()
    return positions if positions <= set(range(n)) else set()


def parse_adapter(adapter: str | Adapter | None) -> Adapter:
    """Returns an adapter, given as a function or as its address. None means `unpack`."""
    return unpack if adapter is None else as_adapter(import_function("adapter", adapter))


def length_of(target: Any) -> int:
    """Returns the number of samples in a target, which may be a mapping or a list of tensors."""
    if isinstance(target, Mapping):
        target = next(iter(target.values()))
    if isinstance(target, Sequence) and target and isinstance(target[0], Tensor):
        target = target[0]
    return len(target)
