"""Keys of two 64-bit integers that identify samples across splits.

A key is a data set and a position in it, or a hash of the content.
"""

from __future__ import annotations

import copy
import hashlib
import operator
import secrets
from collections import deque
from collections.abc import Sequence, Sized
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.preserve import random_state
from lightning_nrl.data.batch import Batch, RecordingSource, Source, is_sliceable, tensors_in

COLUMNS_AT_ONCE = 2**14  # numbers per sample converted to int64 at once, to limit memory
MAX_SAMPLES_HASHED = 1000  # of each data set in memory, to limit time
MAX_SAMPLES_TRIED = 8
"""Number of samples read from a wrapper to find the data set and the positions that it reads."""

KEY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that inputs may be rounded to before they are compared, from fine to coarse."""

AnyDataset = Dataset[Any]


@runtime_checkable
class Identified(Protocol):
    """Source that knows from which data set its samples come."""

    @property
    def identity(self) -> Tensor:
        """Key of each sample of `Source.index`, `n x 2` int64, as returned by `base_samples`."""


def base_samples(dataset: AnyDataset, index: Tensor, *, as_read: bool = False) -> Tensor:
    """Finds each sample's innermost data set and its position in that data set.

    Looks inside subsets, unions and wrappers.

    Args:
        dataset: the outermost data set.
        index: `n` int64, positions in `dataset`.
        as_read: True if a wrapper counts as innermost, since it may change samples, such as by
            augmentation.

    Returns:
        `n x 2` int64: a key of the innermost data set, valid in this process only, and the
        position in it.
    """
    if isinstance(dataset, Subset):
        positions = torch.as_tensor(list(dataset.indices), dtype=torch.int64)
        from_end = positions + len(dataset.dataset)  # type: ignore[arg-type]
        positions = torch.where(positions < 0, from_end, positions)
        return base_samples(dataset.dataset, positions[index], as_read=as_read)
    if isinstance(dataset, ConcatDataset):
        keys = torch.empty(len(index), 2, dtype=torch.int64)
        start = 0
        for part, end in zip(dataset.datasets, dataset.cumulative_sizes, strict=True):
            rows = (start <= index) & (index < end)
            keys[rows] = base_samples(part, index[rows] - start, as_read=as_read)
            start = end
        return keys
    if not as_read and len(index):
        wrapped = _wrapped(dataset, index)
        if wrapped is not None:
            return base_samples(*wrapped)
    key = id(dataset) if as_read else _data_key(dataset)
    return torch.stack([torch.full_like(index, key), index], 1)


def _data_key(dataset: AnyDataset) -> int:
    """Hashes the samples that a data set holds, since a second object may augment the same ones.

    Returns its `id` if its attributes hold no inputs.
    """
    digest = hashlib.sha256()
    has_inputs = False
    with suppress(Exception):  # not in the memory of the CPU, or of no common kind
        n = len(dataset)  # type: ignore[arg-type]
        rows = torch.linspace(0, n - 1, MAX_SAMPLES_HASHED).long().tolist()
        attributes: list[object] = []
        for value in vars(dataset).values():
            # The tensors of a `TensorDataset` are in a tuple.
            attributes += value if isinstance(value, tuple) else [value]
        for value in attributes:
            if isinstance(value, (str, Path, int, float)) and not isinstance(value, bool):
                # Such as the folder of the samples, or where a window starts.
                digest.update(str(value).encode())
            elif isinstance(value, (Tensor, np.ndarray, list)) and len(value) == n:
                samples = [np.asarray(value[i]) for i in rows]
                has_inputs |= samples[0].ndim > 0 or samples[0].dtype.kind == "U"
                digest.update(b"".join(sample.tobytes() for sample in samples))
        if has_inputs:  # equal labels alone may be those of other samples
            return int.from_bytes(digest.digest()[:8], "big", signed=True)
    return id(dataset)


def _wrapped(dataset: AnyDataset, index: Tensor) -> tuple[AnyDataset, Tensor] | None:
    """Finds the data set that a wrapper wraps, and the position of each sample in it.

    Reads some samples. Sample `i` of the wrapper must be read from position `i` of the wrapped data
    set, or from position `places[i]`, where `places` is an attribute of the wrapper. Returns None
    if neither is the case.
    """
    attributes = getattr(dataset, "__dict__", {})  # a list has none
    tried = index[torch.linspace(0, len(index) - 1, MAX_SAMPLES_TRIED).long()].unique()
    lists = [value for value in attributes.values() if not isinstance(value, Dataset)]
    for name, inner in attributes.items():
        if not (isinstance(inner, Dataset) and isinstance(inner, Sized)):
            continue
        requested = _requested_positions(dataset, name, tried.tolist())
        for positions in (range(len(inner)), *lists):
            with suppress(Exception):  # not a list of positions
                operator.index(positions[0])
                places = torch.as_tensor(positions)
                if places[tried % len(places)].tolist() == requested:
                    return inner, places[index % len(places)]
    return None


def _requested_positions(dataset: AnyDataset, name: str, samples: Sequence[int]) -> list[int]:
    """Returns the first position that each sample requests from the data set in attribute `name`.

    Stops at an error.
    """
    view = copy.copy(dataset)
    inner = vars(dataset)[name]
    requests = []
    positions = []

    def record(self: object, i: int) -> object:
        requests.append(int(i))
        return inner[i]

    with suppress(Exception), random_state():
        watched = vars(view)[name] = copy.copy(inner)
        watched.__class__ = type("Watched", (type(inner),), {"__getitem__": record})
        for i in samples:
            requests.clear()
            view[i]
            positions.append(requests[0])
    return positions


def is_among(samples: Tensor, others: Tensor) -> Tensor:
    """Marks the keys in `samples`, `n x 2`, that are also in `others`, `m x 2`, as `n` bool."""
    if not len(others):
        return torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    # For each sample, a hash finds the one key that may be equal. `unique` of rows would take ten
    # times the memory.
    weights = _hash_weights(0, samples.shape[1])[0].to(samples.device)
    hashes, order = (others * weights).sum(1).sort()
    place = torch.searchsorted(hashes, (samples * weights).sum(1)).clamp(max=len(others) - 1)
    candidates = others[order[place]]
    return (samples == candidates).all(1)


def content_recorder(source: Source) -> RecordingSource:
    """Wraps a source so that iterating it records the `content_keys` of its samples."""
    return RecordingSource(source, content_keys, torch.zeros(0, 3, dtype=torch.int64))


def has_content_of(source: RecordingSource, other: RecordingSource, ranks: Collective) -> Tensor:
    """Marks the samples of `source` on all ranks whose content is also in `other`.

    Both are from `content_recorder`. If their dtypes differ in precision, both are read again and
    rounded to the coarsest one.
    """
    keys, other_keys = source.gathered(ranks), other.gathered(ranks)
    dtypes = torch.cat([keys, other_keys])[:, 2].unique()
    if len(dtypes) > 1:
        dtype = KEY_DTYPES[int(dtypes[-1])]
        keys, other_keys = (_rounded_keys(data, dtype, ranks) for data in (source, other))
    return is_among(keys, other_keys)


def _rounded_keys(source: RecordingSource, dtype: torch.dtype, ranks: Collective) -> Tensor:
    rounded = RecordingSource(source.source, partial(content_keys, dtype=dtype), source.empty)
    for _ in rounded:
        pass
    return rounded.gathered(ranks)


def raw_recorder(source: Source) -> RecordingSource:
    """Wraps a source so that iterating it records the `raw_keys` of its samples."""
    return RecordingSource(source, raw_keys, torch.zeros(0, 2, dtype=torch.int64))


def read_keys(sources: Sequence[Source], ranks: Collective) -> list[str]:
    """Reads sources, without keeping a batch, for the `gathered_keys` of their samples."""
    recorders = list(map(raw_recorder, sources))
    failed = "the data could not be read on another rank."
    ranks.all_or_none(lambda: deque(chain(*recorders), 0), failed)
    return gathered_keys(recorders, ranks)


def gathered_keys(recorders: Sequence[RecordingSource], ranks: Collective) -> list[str]:
    """Returns the recorded `raw_keys` of all ranks as texts.

    They are empty if a sample has no tensors, or if batches of a source have rows of different
    sizes, as padded sequences do: then a key depends on the other samples in the batch.
    """
    texts = []
    for recorder in recorders:
        keys, sizes = recorder.gathered(ranks).unbind(1)
        if len(sizes.unique()) > 1:
            keys = torch.zeros_like(keys)
        texts += [f"{key % 2**64:016x}" if key else "" for key in keys.tolist()]
    return texts


def content_keys(batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
    """Hashes the inputs and the target of each sample to two 64-bit integers.

    Returns them with the place in `KEY_DTYPES` of the coarsest dtype, `n x 3`. Samples that are
    equal in `dtype` have equal keys. Each integer is a sum with random weights modulo 2^64, so two
    different samples have equal keys with a probability below 2^-64. Zeros add nothing to a key,
    because sequences may be padded to different lengths. If it is unknown which inputs belong to
    which sample, the keys are random.
    """
    n = len(batch)
    tree = batch.args, batch.kwargs, batch.target
    if not is_sliceable(tree[:2], n) and not _has_samples(batch):
        random = [secrets.randbits(63) for _ in range(2 * n)]
        keys = torch.tensor(random, dtype=torch.int64, device="cpu").view(n, 2)
    else:
        keys = _hash_samples(tree, n, dtype)
    dtypes = {dtype, *(x.dtype for x in tensors_in(tree))}
    coarsest = max(place for place, kind in enumerate(KEY_DTYPES) if kind in dtypes)
    return torch.cat([keys, torch.full_like(keys[:, :1], coarsest)], 1)


def raw_keys(batch: Batch) -> Tensor:
    """Returns a 64-bit hash of each sample's tensors in the raw batch and their size, `n x 2`.

    The hash is 0 if there are no tensors. It does not depend on how a model takes its inputs.
    """
    n = len(batch)
    rows = [x for x in tensors_in(batch.raw) if x.ndim and len(x) == n]
    size = sum(x.numel() for x in rows) // max(1, n)
    keys = _hash_samples(batch.raw, n)[:, 0]
    return torch.stack([keys, torch.full_like(keys, size)], 1)


def _hash_samples(tree: object, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Hashes the tensors in `tree` that have a row for each of `n` samples."""
    keys = torch.zeros(n, 2, dtype=torch.int64)
    for seed, x in enumerate(tensors_in(tree)):
        if x.ndim and len(x) == n:
            rounded = x.detach()
            if x.is_floating_point():
                rounded = rounded.to(dtype)
            keys = keys.to(x.device) + _hash_rows(rounded, seed)
    return keys


def _has_samples(batch: Batch) -> bool:
    """True if all inputs but numbers and texts are tensors and one has a row per sample."""
    has_samples = False
    for leaf in pytree.tree_leaves((batch.args, batch.kwargs)):
        if isinstance(leaf, Tensor):
            has_samples |= leaf.ndim > 1 and len(leaf) == len(batch)
        elif not isinstance(leaf, (int, float, str)):
            return False
    return has_samples


def _hash_rows(x: Tensor, seed: int) -> Tensor:
    if x.is_complex():
        x = torch.view_as_real(x)
    rows = x.reshape(len(x), -1)
    weights = _hash_weights(seed, rows.shape[1]).to(x.device)
    hashes = weights.new_zeros(2, len(x))
    parts = zip(rows.split(COLUMNS_AT_ONCE, 1), weights.split(COLUMNS_AT_ONCE, 1), strict=True)
    for columns, column_weights in parts:
        numbers = _as_integers(columns)
        for i, weight in enumerate(column_weights):
            hashes[i] += (numbers * weight).sum(1)
    return hashes.T


@lru_cache(maxsize=16)
def _hash_weights(seed: int, n: int) -> Tensor:
    # A larger `n` only appends columns.
    generator = torch.Generator("cpu").manual_seed(seed)
    halves = torch.randint(2**32, (n, 2, 2), generator=generator, device="cpu")
    high, low = halves.unbind(2)
    return (high * 2**32 + low).T


def _as_integers(x: Tensor) -> Tensor:
    """Returns equal integers for numbers of any dtype that are equal in float32."""
    numbers = x.float() + 0.0  # gives -0.0 the bits of 0.0
    bits = numbers.contiguous().view(torch.int32).long()
    if x.is_floating_point():
        return bits
    return torch.where(numbers.long() == x.long(), bits, x.long())
