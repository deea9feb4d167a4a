"""Weights of samples as a column of their results: what a repair is worth, what breaking costs, who is in which slice.

What depends on the batch is noted in passing, while the model runs over the data anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_nrl.data import Batch, Source
from lightning_nrl.data.batch import RecordingSource
from lightning_nrl.data.columns import Column, numbers
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation._quotas import normalised
from lightning_nrl.evaluation._slices import renumbered
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.tasks import Task

__all__ = ["breaking_costs", "column_recorder", "values_by_id", "with_repair_worth", "with_slices"]


def column_recorder(source: Source, columns: Mapping[str, Column], task: Task) -> RecordingSource:
    """A source that notes columns of its batches, `n x C` float64; the task knows the labels."""

    def note(batch: Batch) -> Tensor:
        label = task.label(batch.target)
        return torch.stack([numbers(name, column, batch, label) for name, column in columns.items()], 1)

    return RecordingSource(source, note, torch.zeros(0, len(columns), dtype=torch.float64))


def with_slices(results: SampleResults, slices: Sequence[tuple[tuple[str, ...], Tensor]]) -> SampleResults:
    """The results with the slices of all splits, from each split's names of slices and number of each sample's."""
    names = tuple(sorted({name for own, _ in slices for name in own}))
    return replace(results, names=names, group=torch.cat([renumbered(own, group, names) for own, group in slices]))


def with_repair_worth(results: SampleResults, importance: Tensor) -> SampleResults:
    """The results whose targets weigh as much as they are worth, 1 on average.

    Raises:
        ConfigurationError: the importance, `N`, of a target is not above 0 and finite.
    """
    wrong = results.targeted & ~(importance.isfinite() & (importance > 0))
    if wrong.any():
        raise ConfigurationError(
            f"`importance` is {float(importance[wrong][0])} for {int(wrong.sum())} failed samples "
            f"({_some(results, wrong)}).",
            "give finite numbers above 0; leave failures that do not count out of the `target`.",
        )
    return normalised(replace(results, weight=torch.where(results.targeted, importance, results.weight)))


def breaking_costs(results: SampleResults, protected: Tensor | None) -> Tensor:
    """What breaking costs, `N`: 1 by default, infinite where a sample is protected.

    Raises:
        ConfigurationError: a cost is no whole number from 1.
    """
    if protected is None:
        return results.weight
    # A mark, such as a bool, protects.
    marks = bool(((protected == 0) | (protected == 1)).all())
    cost = torch.where(protected > 0, torch.inf, 1.0) if marks else protected
    wrong = results.passed & ~((cost >= 1) & (cost.isinf() | (cost == cost.round())))
    if wrong.any():
        raise ConfigurationError(
            f"`protected` is {float(cost[wrong][0])} for {int(wrong.sum())} passed samples ({_some(results, wrong)}).",
            "give bools, or whole numbers from 1: how many other samples it counts for; infinity protects.",
        )
    return torch.where(results.passed, cost, 1.0)


def values_by_id(argument: str, value: Any, results: SampleResults, splits: Sequence[str], *, strict: bool) -> Tensor:
    """`N` float64 from ids, by themselves or by split, with values or not; 1 or 0 elsewhere.

    Args:
        argument: its name.
        value: ids, such as `[3, 5]`, `{3: 2.0}` or `{"train": [3, 5]}`.
        results: of the samples that the ids are of.
        splits: which splits ids without a name may be of.
        strict: whether every id and split has to be there.

    Raises:
        ConfigurationError: an id or a split is not there.
    """
    by_key = isinstance(value, Mapping)
    has_costs = argument == "protected" and by_key and not all(isinstance(v, (list, tuple)) for v in value.values())
    values = torch.full((len(results),), 1.0 if has_costs or argument == "importance" else 0.0, dtype=torch.float64)
    named = by_key and all(isinstance(key, str) for key in value)
    if not named and len(splits) != 1 and strict:
        raise ConfigurationError(
            f"`{argument}`: the ids may be of any of {list(splits)}.",
            f"say of which: `{argument}={{{splits[0]!r}: ...}}`." if splits else "mark the data that have failures.",
        )
    tables = value if named else {split: value for split in splits[:1] if strict}
    for split, own in tables.items():
        if split not in results.splits:
            if strict and argument != "protected":
                problem = f"`{argument}` names the split {split!r}."
                raise ConfigurationError(problem, f"there are {list(results.splits)}.")
            continue
        pairs = own.items() if isinstance(own, Mapping) else ((i, 1.0) for i in own)
        place = {index: row for row, index in enumerate(results.index[results.of(split)].tolist())}
        start = results.start(split)
        for index, number in pairs:
            if index not in place:
                raise ConfigurationError(
                    f"`{argument}`: {split!r} data have no sample {index!r}.",
                    "ids are positions in the data set, as reports give them.",
                )
            values[start + place[index]] = float(number)
    return values


def _some(results: SampleResults, rows: Tensor) -> str:
    return "; ".join(f"{split}: {ids[:5]}" for split, ids in results.ids(rows).items() if ids)
