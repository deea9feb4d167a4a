"""Lightning's data, read again for a repair: in order, once per sample, as validation reads it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from lightning_nrl._lightning import data_module_of, given_loaders, prepare_batch, sampler_of
from lightning_nrl.data.batch import Adapter, Batch, unpack
from lightning_nrl.data.sample_identity import base_samples
from lightning_nrl.errors import ConfigurationError, DataWarning, explain

__all__ = [
    "LoaderSource",
    "SplitLoaders",
    "batch_size_of",
    "check_loader",
    "find_loader",
    "length_of",
    "make_source",
    "sample_index",
    "warn_if_random",
    "worker_settings",
]

SPLITS = ("train", "val", "repair", "test")


@dataclass(frozen=True)
class LoaderSource:
    """A split read through a data loader, this rank's share of it (see `lightning_nrl.data.batch.Source`).

    Attributes:
        split: the name that reports use.
        passed: whether #pos passed samples are drawn from it.
        failed: whether its failed samples may be repaired.
        index: data-set positions of all its samples, over all ranks.
        positions: this rank's places in that order.
        loader: reads this rank's samples in order.
        transfer: brings a raw batch to the device, as Lightning does in validation.
        adapter: takes a batch apart.
        seed: what random transforms of the data set are seeded with at every pass.
    """

    split: str
    passed: bool
    failed: bool
    index: Tensor
    positions: Tensor
    loader: DataLoader[Any]
    transfer: Callable[[Any], Any]
    adapter: Adapter = unpack
    seed: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)

    @property
    def batch_size(self) -> int:
        """Samples that the model runs on at once."""
        return self.loader.batch_size or 1

    @property
    def identity(self) -> Tensor:
        """`n x 2`, the data set and the place that each sample comes from, seen through subsets and unions."""
        return base_samples(self.loader.dataset, self.index)

    def __iter__(self) -> Iterator[Batch]:
        self.generator.manual_seed(self.seed)
        for seed_global in (torch.manual_seed, np.random.seed, random.seed):
            seed_global(self.seed)
        at = 0
        for raw in self.loader:
            raw = self.transfer(raw)
            args, kwargs, target = self.adapter(raw)
            n = length_of(target)
            expected = min(self.batch_size, len(self.positions) - at)
            if n != expected:
                raise ConfigurationError(
                    explain(
                        f"`{self.split}` data: a batch of {expected} samples came with {n} targets.",
                        "the target's first dimension must count samples; pass an `adapter` for your batches.",
                    )
                )
            yield Batch(args, target, self.positions[at : at + n], kwargs, raw)
            at += n

    def draw(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Chosen samples, read by the same workers as in an ordinary pass."""
        chosen = [self.index[position].tolist() for position in batches]
        loader: DataLoader[Any] = DataLoader(
            self.loader.dataset,
            batch_sampler=chosen,
            collate_fn=self.loader.collate_fn,
            pin_memory=self.loader.pin_memory,
            worker_init_fn=self.loader.worker_init_fn,
            generator=self.generator,
            **worker_settings(self.loader),
        )
        for position, raw in zip(batches, loader, strict=True):
            raw = self.transfer(raw)
            args, kwargs, target = self.adapter(raw)
            yield Batch(args, target, position, kwargs, raw)


def make_source(
    loader: Any,
    split: str,
    *,
    trainer: pl.Trainer,
    model: pl.LightningModule,
    passed: bool = False,
    failed: bool = False,
    adapter: Adapter = unpack,
    seed: int = 0,
    limit: int | None = None,
    whole: bool = False,
) -> LoaderSource:
    """Rebuilds a data loader so that each rank reads its own samples once, in order, nothing dropped or padded.

    Args:
        loader: a `DataLoader` over a map-style data set. A sampler over a subset is kept to that subset, sorted.
        split: the name that reports use.
        trainer: whose strategy moves batches to the device and says how many ranks there are.
        model: whose batch transfer hooks apply.
        passed: whether #pos passed samples are drawn from it.
        failed: whether its failed samples may be repaired.
        adapter: takes a batch apart.
        seed: for random transforms of the data set: the same at every pass.
        limit: read only this many batches, for `fast_dev_run`.
        whole: whether each rank reads all samples.

    Raises:
        ConfigurationError: an iterable data set, several loaders at once, or a data set that batches itself.
    """
    loader = check_loader(loader, split)
    index = sample_index(loader)
    batch_size = batch_size_of(loader)
    if limit is not None:
        index = index[: limit * batch_size]
    positions = torch.arange(len(index))
    if not whole:
        positions = positions[trainer.global_rank :: trainer.world_size]
    generator = torch.Generator()
    again: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=index[positions].tolist(),
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory and torch.cuda.is_available(),
        worker_init_fn=loader.worker_init_fn,
        generator=generator,
        **worker_settings(loader),
    )

    transfer = partial(prepare_batch, trainer, model)
    return LoaderSource(split, passed, failed, index, positions, again, transfer, adapter, seed, generator)


def batch_size_of(loader: DataLoader[Any]) -> int:
    """How many samples a loader puts into a batch; 1 where a batch sampler of the user's own does not say."""
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1


def worker_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """Arguments for a loader that is to read with the same workers as another."""
    if not loader.num_workers:
        return {}
    return {
        "num_workers": loader.num_workers,
        "prefetch_factor": loader.prefetch_factor,
        "multiprocessing_context": loader.multiprocessing_context,
    }


def check_loader(loader: Any, split: str) -> DataLoader[Any]:
    """The one data loader inside what the user gave, if it can be read sample by sample.

    Raises:
        ConfigurationError: it cannot; the message says why.
    """
    if isinstance(loader, Mapping):
        loader = list(loader.values())
    if isinstance(loader, (list, tuple)):
        if len(loader) != 1:
            raise ConfigurationError(
                explain(
                    f"`{split}` data: {len(loader)} data loaders at once.",
                    "name one of them: pass a single DataLoader as `passed=` or `failed=`.",
                )
            )
        return check_loader(loader[0], split)
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(
            explain(
                f"`{split}` data: found {type(loader).__name__}, not a DataLoader.",
                "wrap the data set in a DataLoader.",
            )
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise ConfigurationError(
            explain(
                f"`{split}` data: {type(loader.dataset).__name__} is iterable, its samples have no stable index.",
                "repair needs a map-style data set; pass one as `passed=` and `failed=`.",
            )
        )
    if loader.batch_sampler is None:
        raise ConfigurationError(
            explain(f"`{split}` data: its data set makes whole batches itself.", "give the DataLoader a `batch_size`.")
        )
    if len(loader.dataset) == 0:
        raise ConfigurationError(
            explain(f"`{split}` data: the data set is empty.", "name another split, or pass a DataLoader with samples.")
        )
    return loader


@dataclass(frozen=True)
class SplitLoaders:
    """A trainer's data loaders, each asked for once: a data module may make its data anew every time.

    Attributes:
        trainer: in the middle of a fit.
        model: its module.
    """

    trainer: pl.Trainer
    model: pl.LightningModule
    _loaders: dict[str, Any] = field(default_factory=dict)

    def get(self, split: str) -> Any:
        """The data loader of a split; None where there is none, see `find_loader`."""
        if split not in self._loaders:
            self._loaders[split] = find_loader(split, self.trainer, self.model)
        return self._loaders[split]


def find_loader(split: str, trainer: pl.Trainer, model: pl.LightningModule) -> Any:
    """The trainer's data loader of a split: `train`, `val`, `repair` or `test`; None where there is none."""
    if split in ("train", "val"):
        ready = trainer.train_dataloader if split == "train" else trainer.val_dataloaders
        given = ready if ready is not None else given_loaders(trainer, split)
        if given is not None:
            return given
    data = data_module_of(trainer)
    holder, base = (model, pl.LightningModule) if data is None else (data, pl.LightningDataModule)
    name = f"{split}_dataloader"
    hook = getattr(holder, name, None)
    if not callable(hook) or getattr(type(holder), name, None) is getattr(base, name, object()):
        return None
    try:
        return hook()
    except Exception:
        if split != "test" or data is None:
            raise
        # Only now: a data module may split its data anew in every `setup`.
        data.setup("test")
        return hook()


def warn_if_random(sources: Sequence[LoaderSource]) -> None:
    """Warns of a data set that gives another sample at a second look, such as one that augments for training.

    Every pass of a repair sees the same random numbers, so that the repair itself is consistent.
    """
    for source in sources:
        if len(source.index):
            first, again = (source.loader.dataset[int(source.index[0])] for _ in range(2))
            if not _same(first, again):
                rank_zero_warn(
                    explain(
                        f"`{source.split}` data: reading a sample twice gives two different samples.",
                        "if that is augmentation, pass a DataLoader without it as `passed=` or `failed=`.",
                    ),
                    category=DataWarning,
                )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (Tensor, np.ndarray)):
        return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind in "fc"))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return not isinstance(a, (int, float, str)) or a == b or a != a


def sample_index(loader: DataLoader[Any]) -> Tensor:
    """Positions of the samples that a loader would give, ascending: a subset sampler's, else the whole data set."""
    _, sampler = sampler_of(loader)
    subset = getattr(sampler, "indices", None)
    if subset is not None and not isinstance(sampler, SequentialSampler):
        return torch.as_tensor(sorted({int(i) for i in subset}), dtype=torch.int64)
    return torch.arange(len(loader.dataset))  # type: ignore[arg-type]


def length_of(target: Any) -> int:
    """How many samples a target is about."""
    if isinstance(target, Mapping):
        target = next(iter(target.values()))
    if isinstance(target, Sequence) and target and isinstance(target[0], Tensor):
        target = target[0]
    return len(target)
