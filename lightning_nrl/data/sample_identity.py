"""Keys of two 64-bit integers that identify samples across splits: data set and position, or a hash
of the content.
"""

from __future__ import annotations

import copy
import operator
import secrets
from collections.abc import Sequence, Sized
from contextlib import suppress
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_nrl._utils.preserve import random_state
from lightning_nrl.data.batch import Batch, RecordingSource, Source, is_sliceable, tensors_in

COLUMNS_AT_ONCE = 2**14  # numbers per sample converted to int64 at once, to limit memory
MAX_SAMPLES_TRIED = 8
"""Number of samples that are read from a wrapper to find out which data set it wraps, and which
positions it reads.
"""


@runtime_checkable
class Identified(Protocol):
    """Source that knows from which data set its samples come."""

    @property
    def identity(self) -> Tensor:
        """Key of each sample of `Source.index`, `n x 2` int64, as returned by `base_samples`."""


def base_samples(dataset: Dataset[Any], index: Tensor, *, as_read: bool = False) -> Tensor:
    """Finds each sample's innermost data set, inside subsets, unions and wrappers, and its position
    in
    that data set.

    Args:
        dataset: the outermost data set.
        index: `n` int64, positions in `dataset`.
        as_read: True if a wrapper counts as innermost, since it may change samples, such as by
            augmentation.

    Returns:
        `n x 2` int64: the `id` of the innermost data set, valid in this process only, and the
        position in it.
    """
    if isinstance(dataset, Subset):
        inner = torch.as_tensor(list(dataset.indices), dtype=torch.int64)[index]
        length = len(dataset.dataset)  # type: ignore[arg-type]
        return base_samples(
            dataset.dataset, torch.where(inner < 0, inner + length, inner), as_read=as_read
        )
    if isinstance(dataset, ConcatDataset):
        ends = torch.tensor(dataset.cumulative_sizes)
        part = torch.searchsorted(ends, index, right=True)
        pairs = torch.empty(len(index), 2, dtype=torch.int64)
        for number, (own, end) in enumerate(zip(dataset.datasets, ends.tolist(), strict=True)):
            rows = part == number
            pairs[rows] = base_samples(own, index[rows] - end + len(own), as_read=as_read)  # type: ignore[arg-type]
        return pairs
    if not as_read and len(index) and (found := _wrapped(dataset, index)) is not None:
        return base_samples(*found)
    return torch.stack([torch.full_like(index, id(dataset)), index], 1)


def _wrapped(dataset: Dataset[Any], index: Tensor) -> tuple[Dataset[Any], Tensor] | None:
    """Reads some samples of a wrapper to find the data set that it wraps, and the position of each
    sample in it.

    Sample `i` of the wrapper must be read from position `i` of the wrapped data set, or from
    position `places[i]`, where `places` is an attribute of the wrapper. Returns None if neither is
    the case.
    """
    own = getattr(dataset, "__dict__", {})
    tried = index[torch.linspace(0, len(index) - 1, MAX_SAMPLES_TRIED).long()].unique()
    for name, inner in own.items():
        if not (isinstance(inner, Dataset) and isinstance(inner, Sized)):
            continue
        asked = _requested_positions(dataset, name, tried.tolist())
        for listed in (range(len(inner)), *(x for x in own.values() if not isinstance(x, Dataset))):
            with suppress(Exception):  # not a list of positions
                operator.index(listed[0])
                places = torch.as_tensor(listed)
                if places[tried % len(places)].tolist() == asked:
                    return inner, places[index % len(places)]
    return None


def _requested_positions(dataset: Dataset[Any], name: str, samples: Sequence[int]) -> list[int]:
    """Returns the first position that each sample requests from the data set in attribute `name`.
    Stops at an error.
    """
    view, inner, asked, found = copy.copy(dataset), vars(dataset)[name], list[int](), list[int]()

    def noted(self: Any, i: Any) -> Any:
        asked.append(int(i))
        return inner[i]

    with suppress(Exception), random_state():
        watched = vars(view)[name] = copy.copy(inner)
        watched.__class__ = type("Watched", (type(inner),), {"__getitem__": noted})
        for i in samples:
            asked.clear()
            view[i]
            found.append(asked[0])
    return found


def is_among(samples: Tensor, others: Tensor) -> Tensor:
    """Marks the keys in `samples`, `n x 2`, that are also in `others`, `m x 2`. Returns `n` bool."""
    _, number = torch.unique(torch.cat([samples, others]), dim=0, return_inverse=True)
    return torch.isin(number[: len(samples)], number[len(samples) :])


def content_recorder(source: Source) -> RecordingSource:
    """Wraps a source so that it records the key of each sample's content (`content_keys`) when it
    is iterated.
    """
    return RecordingSource(source, content_keys, torch.zeros(0, 2, dtype=torch.int64))


def content_keys(batch: Batch) -> Tensor:
    """Hashes the inputs and the target of each sample to two 64-bit integers, `n x 2`.

    Bit-identical samples have equal keys. Each integer is a sum with random weights modulo 2^64, so
    two different samples have equal keys with a probability below 2^-64. Zeros add nothing to a
    key, because sequences may be padded to different lengths. If it is unknown which inputs belong
    to which sample, the keys are random.
    """
    n = len(batch)
    if not is_sliceable((batch.args, batch.kwargs), n) and not _has_samples(batch):
        generator = torch.Generator("cpu").manual_seed(secrets.randbits(63))
        return torch.randint(-(2**62), 2**62, (n, 2), generator=generator, device="cpu")
    total: Tensor | None = None
    for place, x in enumerate(tensors_in((batch.args, batch.kwargs, batch.target))):
        if x.ndim == 0 or len(x) != n:
            continue
        x = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
        columns = x.reshape(n, -1)
        weights = _hash_weights(place, columns.shape[1]).to(x.device)
        own = torch.zeros(n, 2, dtype=torch.int64, device=x.device)
        for some, weight in zip(
            *(x.split(COLUMNS_AT_ONCE, 1) for x in (columns, weights)), strict=True
        ):
            numbers = _as_integers(some)
            own += torch.stack([(numbers * row).sum(1) for row in weight], 1)
        total = own if total is None else total + own.to(total.device)
    return torch.zeros(n, 2, dtype=torch.int64) if total is None else total


def _has_samples(batch: Batch) -> bool:
    """True if all inputs but numbers and texts are tensors, and one of at least two dimensions has
    a row per sample.
    """
    leaves = [
        x
        for x in pytree.tree_leaves((batch.args, batch.kwargs))
        if not isinstance(x, (int, float, str))
    ]
    return all(isinstance(x, Tensor) for x in leaves) and any(
        x.ndim > 1 and len(x) == len(batch) for x in leaves
    )


@lru_cache(maxsize=16)
def _hash_weights(seed: int, n: int) -> Tensor:
    # A larger `n` only appends columns.
    generator = torch.Generator("cpu").manual_seed(seed)
    halves = torch.randint(2**32, (n, 2, 2), generator=generator, dtype=torch.int64, device="cpu")
    return (halves[..., 0] * 2**32 + halves[..., 1]).T


def _as_integers(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x.long()
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = x if x.element_size() in kinds else x.float()
    # Adding 0.0 gives -0.0 the bits of 0.0.
    return (whole + 0.0).contiguous().view(kinds[whole.element_size()]).long()
