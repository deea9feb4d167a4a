"""Slices (named subsets of samples), quotas (required repairs in a slice), groups of samples."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import chain, count
from types import NoneType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lightning_nrl._utils.checks import count_or_share, read_number
from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.formatting import writable
from lightning_nrl.data.batch import Batch, RecordingSource, Source
from lightning_nrl.data.columns import Column, column_values
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import Task

Slices = Column
"""Column of a name, number or bool per sample, or a target, whose samples form a slice."""
MAX_SLICES = 200  # each slice has its own curves; more than 200 are most likely ids


@runtime_checkable
class _Array(Protocol):
    def tolist(self) -> object: ...


class SliceRecorder(RecordingSource):
    """Source that records the slice of each sample; `slices=None` means no slices.

    Errors name `argument`.
    """

    def __init__(
        self, source: Source, slices: Slices | None, task: Task, argument: str = "slices"
    ) -> None:
        super().__init__(source, self._note, torch.zeros(0).long())
        self.slices = slices
        self.task = task
        self.argument = argument
        self._numbers: dict[str, int] = {}

    def __iter__(self) -> Iterator[Batch]:
        self._numbers = {}
        return super().__iter__()

    def _note(self, batch: Batch) -> Tensor:
        numbers = [-1] * len(batch)
        for i, name in enumerate(self.names(batch)):
            if name:
                numbers[i] = self._numbers.setdefault(name, len(self._numbers))
        return torch.tensor(numbers)

    def names(self, batch: Batch) -> list[str]:
        """Returns the name of each sample's slice; an empty text stands for no slice."""
        name_of_true = getattr(self.slices, "__name__", "chosen")
        if isinstance(self.slices, Target):
            name_of_true = str(self.slices)
        return [_slice_name(value, name_of_true) for value in self._values(batch)]

    def _values(self, batch: Batch) -> Sequence[object]:
        if self.slices is None:
            return [None] * len(batch)
        column = column_values(self.argument, self.slices, batch, self.task.label(batch.target))
        values = column.tolist() if isinstance(column, _Array) else column
        kinds = (str, int, np.integer, np.bool_, NoneType)
        if (
            not isinstance(values, (list, tuple))
            or len(values) != len(batch)
            or not all(isinstance(value, kinds) for value in values)
        ):
            raise ConfigurationError(
                f"`{self.argument}` returned {type(column).__name__} {str(column)[:60]} for a "
                f"batch of {len(batch)} samples.",
                "return one name, whole number or bool for each sample.",
            )
        return [writable(value) if isinstance(value, str) else value for value in values]

    def named(self, collective: Collective) -> tuple[tuple[str, ...], Tensor]:
        """Returns the slice names of all ranks, and each sample's index in these (-1: no slice)."""
        own_names = list(self._numbers)
        names = sorted(set(chain(*collective.gather_objects(own_names))))
        if len(names) > MAX_SLICES:
            raise ConfigurationError(
                f"`{self.argument}` gave {len(names):,} slices, such as {', '.join(names[:3])}.",
                f"return one of at most {MAX_SLICES} names or numbers for each sample.",
            )
        self.noted = [_renumber(group, own_names, names) for group in self.noted]
        return tuple(names), self.gathered(collective)


class GroupRecorder(SliceRecorder):
    """Source that records a number for the group of each sample.

    The same value has the same number in all splits and on all ranks.
    """

    def _note(self, batch: Batch) -> Tensor:
        numbers = []
        for value in self._values(batch):
            name = str(value).strip()
            if value is None or not name:
                raise ConfigurationError(
                    f"`{self.argument}`: a sample of `{self.split}` has the group {value!r}.",
                    "give each sample a name or a whole number; a sample that resembles no other "
                    "gets a name of its own.",
                )
            numbers.append(
                int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
            )
        return torch.tensor(numbers)


def _renumber(group: Tensor, old_names: Sequence[str], names: Sequence[str]) -> Tensor:
    """Converts indices in `old_names` to indices in `names`; -1 stays."""
    numbers = [names.index(name) for name in old_names]
    return torch.tensor([*numbers, -1])[group]


def common_names(
    parts: Sequence[tuple[tuple[str, ...], Tensor]],
) -> tuple[tuple[str, ...], Tensor]:
    """Joins the results of `SliceRecorder.named` for several splits.

    Returns all names and each sample's index in these.
    """
    names = sorted(set(chain(*(part_names for part_names, _ in parts))))
    check_distinct(names)
    groups = [_renumber(group, part_names, names) for part_names, group in parts]
    return tuple(names), torch.cat(groups)


def check_distinct(names: Sequence[str]) -> None:
    """Refuses names that differ only in case or outer spaces, since they split a slice."""
    by_word: dict[str, str] = {}
    for name in names:
        known = by_word.setdefault(name.strip().casefold(), name)
        if known != name:
            raise ConfigurationError(
                f"`slices` has the names {known!r} and {name!r}.",
                "give each slice one name; they differ only in case or spaces.",
            )


def _slice_name(value: object, name_of_true: str) -> str:
    if isinstance(value, (bool, np.bool_)):
        return name_of_true if value else ""
    if value is None or not str(value).strip():
        return ""
    return str(value)


def slice_tags(names: Collection[str]) -> dict[str, str]:
    """Returns a unique tag for each slice name, with only characters that all loggers accept."""
    tags: dict[str, str] = {}
    # A name that is a tag itself comes first, and keeps it.
    for name in sorted(names, key=lambda name: (_plain(name) != name, name)):
        tag = _plain(name)
        numbers = count(2)
        while tag in tags.values():
            tag = f"{_plain(name)}_{next(numbers)}"
        tags[name] = tag
    return tags


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("_") or "chosen"


Quota = int | float | str
"""Number or share of the targets in a slice that must be repaired: `5`, `0.5` or `"50%"`."""


def checked_quotas(quotas: Mapping[str, Quota]) -> dict[str, int | float]:
    """Parses the quotas of slices into whole numbers from 1 or shares above 0 and at most 1."""
    hint = (
        "write `quotas={'night': 5, 'truck': 0.5}`: a whole number of targets from 1, or a share "
        "of them."
    )
    if not isinstance(quotas, Mapping):
        raise ConfigurationError(f"`quotas`: found a {type(quotas).__name__}, not a mapping.", hint)
    checked = {}
    for key, quota in quotas.items():
        name = str(key)
        value = quota
        if isinstance(value, str):
            value = read_number(f"`quotas[{key!r}]`", value.strip(), hint)
        number = count_or_share(value)
        if name in checked:
            raise ConfigurationError(
                f"`quotas` names the slice {name!r} twice.", "give each slice one quota."
            )
        if not number:
            raise ConfigurationError(f"`quotas`: {quota!r} for {key!r} is no quota.", hint)
        checked[name] = number
    return checked


def required_repairs(
    before: SampleResults, quotas: Mapping[str, Quota]
) -> tuple[dict[str, int], str]:
    """Returns the number of repairs that each slice with a quota needs, and an empty text.

    If a quota cannot be met, returns `{}` and a text that says why.
    """
    required = {}
    for name, quota in checked_quotas(quotas).items():
        if name not in before.slices:
            names = ", ".join(before.slices) or "no slices"
            return {}, f"`quotas` names the slice {name!r}, but the data have {names}."
        n = int((before.targeted & _in_slice(before, name)).sum())
        if isinstance(quota, int):
            required[name] = quota
        else:
            # Exact arithmetic: with floats, 7 % of 100 would be more than 7.
            required[name] = math.ceil(Fraction(repr(quota)) * n)
        if n == 0:
            return {}, f"`quotas` asks for repairs in the slice {name!r}, which has no target."
        if required[name] > n:
            problem = f"`quotas` asks for {required[name]:,} repairs in the slice {name!r}"
            return {}, f"{problem}, which has {n:,} targets."
    return required, ""


def missed_quotas(
    before: SampleResults, repaired: Tensor, needed: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Returns the numbers of repaired and of `needed` targets, for slices with too few.

    `repaired` is `N` bool.
    """
    missed = {}
    for name, n_needed in needed.items():
        n_repaired = int((before.targeted & repaired & _in_slice(before, name)).sum())
        if n_repaired < n_needed:
            missed[name] = (n_repaired, n_needed)
    return missed


def upweight_slices(before: SampleResults, names: Collection[str], factor: float) -> SampleResults:
    """Multiplies the weights of targets in the slices `names`, then normalises all weights."""
    weight = before.weight.clone()
    for name in names:
        weight[before.targeted & _in_slice(before, name)] *= factor
    return normalise_weights(replace(before, weight=weight))


def normalise_weights(before: SampleResults) -> SampleResults:
    """Scales targets' weights to a mean of 1 and sets other failures' weights to 1."""
    weight = torch.where(before.passed, before.weight, 1.0)
    targets = before.weight[before.targeted]
    if len(targets):
        weight = torch.where(before.targeted, before.weight / targets.mean(), weight)
    if bool((weight == 1).all()):
        weight = torch.ones_like(weight[:1]).expand(len(weight))  # which takes no memory
    return replace(before, weight=weight)


def _in_slice(before: SampleResults, name: str) -> Tensor:
    return before.slice_number == before.slices.index(name)
