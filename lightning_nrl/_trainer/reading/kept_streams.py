"""Keeps the samples of a stream in memory, so that they can be read by index."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from itertools import islice
from typing import cast
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from lightning_nrl._trainer.lightning.private_parts import Loader
from lightning_nrl._trainer.reading.loaders import Sample, batch_size_of, loader_like
from lightning_nrl._utils.preserve import random_state, seed_all
from lightning_nrl.errors import ConfigurationError

STREAM_LIMIT = 4 * 2**30  # bytes; enough for most, and an endless stream ends in minutes
MAX_SAMPLES_MEASURED = 100
TENSOR_OVERHEAD = 500  # bytes of a tensor besides its numbers
# The most samples that a read of a stream has given in this process.
LONGEST_READS: MutableMapping[object, int] = WeakKeyDictionary()


class KeptStream(Dataset[Sample]):
    """Samples of an `IterableDataset` in the order of one read; the index counts them.

    `longest` is the number of samples of the longest read of the stream so far.
    """

    @random_state()
    def __init__(
        self, stream: Loader, name: str, limit: int, max_batches: int | None, n_trained: int = 0
    ) -> None:
        """Reads the stream. Refuses one whose samples need more than `limit` bytes.

        `n_trained` is a lower bound of the samples that an epoch of the training has read.
        """
        self.stream = cast(IterableDataset[Sample], stream.dataset)
        self.max_samples = None if max_batches is None else max_batches * batch_size_of(stream)
        self.samples: list[Sample] = []
        size = 0.0
        for n, sample in enumerate(self.read(seed=0), 1):
            self.samples.append(sample)
            if n <= MAX_SAMPLES_MEASURED:
                size += (_size_of(sample) - size) / n
            if n * size > limit:
                raise ConfigurationError(
                    f"`{name}` data: a stream that is endless or too long to be kept in memory: "
                    f"{n:,} of its samples take {n * size / 1e6:,.3g} MB.",
                    "give a stream that ends earlier, `data=DataOptions(passed=DataLoader(stream, "
                    f"batch_size=64))`, or more memory, `data=DataOptions(stream_limit={2 * limit})"
                    "`, in bytes.",
                )
        if next(self.read(seed=0), None) is None:
            raise ConfigurationError(
                f"`{name}` data: the stream is empty on a second read.",
                "give a stream that starts anew in each `__iter__`.",
            )
        self.n_bytes = int(size * len(self))
        self.longest = max(len(self), n_trained, LONGEST_READS.get(self.stream, 0))
        LONGEST_READS[self.stream] = self.longest

    def __len__(self) -> int:
        return len(self.samples)

    def loader_like(self, stream: Loader) -> Loader:
        """Returns a loader like that of the stream, of the samples in memory."""
        return loader_like(
            stream,
            self,
            batch_size=stream.batch_size,
            num_workers=0,
            prefetch_factor=None,
            multiprocessing_context=None,
        )

    def __getitem__(self, i: int) -> Sample:
        return self.samples[i]

    def read(self, seed: int) -> Iterator[Sample]:
        """Reads the stream anew, in this process, after seeding the global generators."""
        seed_all(seed)
        return islice(self.stream, self.max_samples)


def _size_of(sample: Sample) -> int:
    size = 0
    for part in pytree.tree_leaves(sample):
        if isinstance(part, (Tensor, np.ndarray)):
            size += part.nbytes + TENSOR_OVERHEAD
        else:
            with suppress(Exception):  # it cannot be pickled
                size += len(pickle.dumps(part))
    return size
