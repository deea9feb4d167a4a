"""Slices, which are named subsets of samples, and quotas, the repairs required in a slice."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nrl._utils.checks import count_or_share, read_number
from lightning_nrl._utils.distributed import Collective
from lightning_nrl.data.batch import Batch, RecordingSource, Source
from lightning_nrl.data.columns import column_values
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import Task

Slices = Callable[[Any], Any] | Target
"""Function of a raw batch that returns a name, number or bool per sample, or a target, whose
samples form a slice.
"""
MAX_SLICES = 200  # each slice has its own curves; more than 200 are most likely ids


class SliceRecorder(RecordingSource):
    """Source that records the slice of each sample. `slices=None` means no slices. Errors name
    `argument`.
    """

    def __init__(
        self, source: Source, slices: Slices | None, task: Task, argument: str = "slices"
    ) -> None:
        super().__init__(source, self._note, torch.zeros(0, dtype=torch.int64))
        self.slices, self.task, self.argument = slices, task, argument
        self._numbers: dict[str, int] = {}

    def __iter__(self) -> Iterator[Batch]:
        self._numbers = {}
        return super().__iter__()

    def _note(self, batch: Batch) -> Tensor:
        names = [None] * len(batch) if self.slices is None else self._names(self.slices, batch)
        numbers = self._numbers
        return torch.tensor(
            [-1 if name is None else numbers.setdefault(name, len(numbers)) for name in names]
        )

    def _names(self, slices: Slices, batch: Batch) -> Sequence[str | None]:
        found = column_values(self.argument, slices, batch, self.task.label(batch.target))
        values = found.tolist() if hasattr(found, "tolist") else found
        fits = isinstance(values, (list, tuple)) and len(values) == len(batch)
        if not fits or not all(
            isinstance(value, (str, int, np.integer, np.bool_, type(None))) for value in values
        ):
            what = f"{type(found).__name__} {str(found)[:60]}"
            raise ConfigurationError(
                f"`{self.argument}` returned {what} for a batch of {len(batch)} samples.",
                "return one name, whole number or bool for each sample.",
            )
        own = str(slices) if isinstance(slices, Target) else getattr(slices, "__name__", "chosen")
        return [_slice_name(own, value) for value in values]

    def named(self, collective: Collective) -> tuple[tuple[str, ...], Tensor]:
        """Returns the slice names of all ranks, and the index of each sample's slice in these names
        (-1: no slice).
        """
        mine = json.dumps(list(self._numbers)).encode()
        lists = collective.gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        names = sorted({name for row in lists for name in json.loads(bytes(row.tolist()))})
        if len(names) > MAX_SLICES:
            raise ConfigurationError(
                f"`{self.argument}` gave {len(names):,} slices, such as {', '.join(names[:3])}.",
                f"return one of at most {MAX_SLICES} names or numbers for each sample.",
            )
        self.noted = [
            (at, _renumber(list(self._numbers), group, names)) for at, group in self.noted
        ]
        self._numbers = {name: i for i, name in enumerate(names)}
        return tuple(names), self.gathered(collective)


def _renumber(own: Sequence[str], group: Tensor, names: Sequence[str]) -> Tensor:
    return torch.tensor([*(names.index(name) for name in own), -1])[group]


def common_names(parts: Sequence[tuple[tuple[str, ...], Tensor]]) -> tuple[tuple[str, ...], Tensor]:
    """Joins the results of `SliceRecorder.named` for several splits into all names and each
    sample's index in these.
    """
    names = tuple(sorted({name for own, _ in parts for name in own}))
    return names, torch.cat([_renumber(own, group, names) for own, group in parts])


def _slice_name(own: str, value: Any) -> str | None:
    """Returns the name of a sample's slice: `own` for True, None (no slice) for False, None and
    empty text.
    """
    if isinstance(value, (bool, np.bool_)):
        return own if value else None
    return None if value is None or not str(value).strip() else str(value)


def slice_tags(names: Collection[str]) -> dict[str, str]:
    """Returns a unique tag for each slice name, with only characters that all loggers accept."""
    plain = {name: re.sub(r"[^\w.-]+", "_", name).strip("_") or "chosen" for name in names}
    tags: dict[str, str] = {}
    for name in sorted(plain, key=lambda name: (plain[name] != name, name)):
        numbered = (f"{plain[name]}_{n}" for n in count(2))
        tags[name] = next(tag for tag in chain([plain[name]], numbered) if tag not in tags.values())
    return tags


Quota = int | float | str
"""Number or share of the targets in a slice that must be repaired: `5`, `0.5` or `"50%"`."""


def checked_quotas(quotas: Any) -> dict[str, int | float]:
    """Parses the quotas of slices into whole numbers from 1 or shares above 0 and at most 1."""
    hint = "write `quotas={'night': 5, 'truck': 0.5}`: a whole number of targets from 1, or a share of them."
    if not isinstance(quotas, Mapping):
        raise ConfigurationError(f"`quotas`: found a {type(quotas).__name__}, not a mapping.", hint)
    found: dict[str, int | float] = {}
    for name, quota in quotas.items():
        given = (
            read_number(f"`quotas[{name!r}]`", quota.strip(), hint)
            if isinstance(quota, str)
            else quota
        )
        number = count_or_share(given)
        if str(name) in found:
            raise ConfigurationError(
                f"`quotas` names the slice {str(name)!r} twice.", "give each slice one quota."
            )
        if not number:
            raise ConfigurationError(f"`quotas`: {quota!r} for {name!r} is no quota.", hint)
        found[str(name)] = number
    return found


def required_repairs(
    before: SampleResults, quotas: Mapping[str, Quota]
) -> tuple[dict[str, int], str]:
    """Returns the number of repairs that each slice with a quota needs, and an empty text.

    If a quota cannot be met, returns `{}` and a text that says why.
    """
    found: dict[str, int] = {}
    for name, quota in checked_quotas(quotas).items():
        if name not in before.names:
            return (
                {},
                f"`quotas` names the slice {name!r}, but the data have {', '.join(before.names) or 'no slices'}.",
            )
        n = int((before.targeted & _in_slice(before, name)).sum())
        # Exact arithmetic: with floats, 7 % of 100 would be more than 7.
        found[name] = quota if isinstance(quota, int) else math.ceil(Fraction(repr(quota)) * n)
        if found[name] > n or n == 0:
            asked = f"{found[name]:,} " if n else ""
            has = f"{n:,} targets" if n else "no target"
            return {}, f"`quotas` asks for {asked}repairs in the slice {name!r}, which has {has}."
    return found, ""


def missed_quotas(
    before: SampleResults, repaired: Tensor, needed: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Returns the numbers of repaired and of `needed` targets, for slices with too few. `repaired`
    is `N` bool.
    """
    got = {
        name: int((before.targeted & repaired & _in_slice(before, name)).sum()) for name in needed
    }
    return {name: (got[name], need) for name, need in needed.items() if got[name] < need}


def upweight_slices(before: SampleResults, names: Collection[str], factor: float) -> SampleResults:
    """Multiplies the weights of the targets in the slices `names` by `factor`, then normalises all
    weights.
    """
    inside = torch.zeros_like(before.targeted)
    for name in names:
        inside |= _in_slice(before, name)
    weight = torch.where(before.targeted & inside, factor * before.weight, before.weight)
    return normalise_weights(replace(before, weight=weight))


def normalise_weights(before: SampleResults) -> SampleResults:
    """Scales targets' weights to a mean of 1 and sets other failures' weights to 1. Keeps passed
    samples' weights.
    """
    targeted = before.targeted
    mean = before.weight[targeted].mean() if targeted.any() else 1.0
    weight = torch.where(
        targeted, before.weight / mean, torch.where(before.passed, before.weight, 1.0)
    )
    return replace(before, weight=weight)


def _in_slice(before: SampleResults, name: str) -> Tensor:
    return before.group == before.names.index(name)
