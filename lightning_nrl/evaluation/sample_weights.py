"""What each sample counts: failures that matter more or are harder, passed samples that may not break, labels in doubt.

All of it ends as one column of the evidence, `SampleResults.weight`, and as targets less. What depends on the batch is
noted in passing, while the model runs over the data anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_nrl._utils.distributed import Collective
from lightning_nrl.data.batch import Batch, Source
from lightning_nrl.data.columns import Column, find_column, numbers
from lightning_nrl.data.targets import Target
from lightning_nrl.errors import ConfigurationError, check_choice, explain
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.quotas import Quota, checked_quotas, normalised
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.evaluation.slices import SliceRecorder
from lightning_nrl.tasks import Task

__all__ = ["DOUBTFUL", "KEEPS", "Focal", "Keep", "SampleOptions"]

DOUBTFUL = "doubtful"
"""Sets aside the failures whose label looks wrong (`lightning_nrl.evaluation.neighbors.doubtful`)."""

Keep = Literal["both", "reference"]
"""In an update, what may not break: what either model gets right, or only what the replaced one does too."""
KEEPS: tuple[Keep, ...] = get_args(Keep)

WORDS = {"importance": ("focal",), "set_aside": (DOUBTFUL,)}


@dataclass(frozen=True)
class Focal:
    """Hard failures count more: each (1 - p)^gamma, p the probability that the model gives the truth.

    The factor of the focal loss (Lin et al., 2017). p is exp(-loss), which for cross entropy is that probability.

    Attributes:
        gamma: 0 makes all alike; the larger, the more the hard ones count.

    Raises:
        ConfigurationError: on construction, for a gamma that is not a finite number from 0.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        if not (isinstance(self.gamma, Real) and math.isfinite(self.gamma) and self.gamma >= 0):
            raise ConfigurationError(
                explain(f"`Focal.gamma={self.gamma!r}` is out of range.", "give a finite number from 0.")
            )

    def weigh(self, evidence: SampleResults) -> Tensor:
        """`N` float64, above 0 wherever the loss is."""
        tiny = torch.finfo(torch.float32).tiny
        return (1 - torch.exp(-evidence.loss.double().clamp_min(0))).clamp_min(tiny) ** self.gamma


@dataclass(frozen=True)
class SampleOptions:
    """What each sample counts: failures that matter more, samples that may not break, slices, labels in doubt.

    A column is a key or a place in your batches, a function of a batch, or its address, `package.module:function`.

    Attributes:
        importance: what repairing each failed sample is worth, beside the others: a column of numbers above 0, ids as
            `{id: number}` or `{split: {id: number}}`, or `"focal"` or `Focal(gamma)`: hard ones count more. None: all
            alike.
        slices: the slice that each sample is in, likewise a column, of names, numbers or bools, or a target; the report
            has a row for each.
        quotas: how many targets of a slice must be repaired for a repair to be accepted:
            `{"night": 5, "truck": "50%"}`.
        protected: passed samples that may not break, whatever the gate tolerates, on known and calibration data: a
            column of bools, a target, or ids by split. Whole numbers say how many other samples one counts for.
        set_aside: failed samples that are no targets although they are in the target: a column of bools, a target, ids,
            or `"doubtful"`, those whose label looks wrong. They are listed in the report.
        keep: in an update, what may not break: `both`, what the new model or the replaced one gets right, or
            `reference`, only what both of them get right.

    Raises:
        ConfigurationError: on construction, for what is no column, no mapping by id and no known word.
    """

    importance: Any = None
    slices: Any = None
    quotas: Mapping[str, Quota] | None = None
    protected: Any = None
    set_aside: Any = None
    keep: Keep = "both"

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, KEEPS)
        for name in ("importance", "slices", "protected", "set_aside"):
            value = getattr(self, name)
            by_id = isinstance(value, Mapping) if name == "importance" else isinstance(value, (Mapping, list, tuple))
            if name != "slices" and (by_id or value in WORDS.get(name, ()) or isinstance(value, Focal)):
                continue
            if value is not None:
                find_column(name, value)
        if self.quotas is not None:
            object.__setattr__(self, "quotas", checked_quotas(self.quotas))
            if self.slices is None:
                raise ConfigurationError(
                    explain(
                        f"`quotas={self.quotas!r}` needs slices, and there are none.",
                        "say with `slices` which slice each sample is in.",
                    )
                )

    def columns(self) -> SampleOptions:
        """What of it is said by columns of batches, for a look at a few samples."""
        names = ("importance", "protected", "set_aside")
        own = {name: getattr(self, name) for name in names if self._is_column(name, getattr(self, name))}
        return SampleOptions(slices=self.slices, **own)

    def over(
        self,
        evaluator: Evaluator,
        sources: Sequence[Source],
        target: Target | None = None,
        *,
        everywhere: bool = False,
        known: bool = True,
    ) -> tuple[SampleResults, Tensor]:
        """SampleResults with slices and weights, and without the targets that are set aside.

        Args:
            evaluator: the model and what judges it.
            sources: this rank's share of the splits.
            target: which failed samples are marked as targeted; None marks none.
            everywhere: whether those of all sources are marked, not only of those whose failures may be repaired.
            known: whether these are known data. Of others slices and protected samples alone matter.

        Returns:
            The evidence, and `N` bool, the failed samples that are set aside.

        Raises:
            ConfigurationError: a column or an id is not there, or has values that mean nothing.
        """
        asked = {"protected": self.protected}
        asked |= {"importance": self.importance, "set_aside": self.set_aside} if known else {}
        columns = {name: find_column(name, value) for name, value in asked.items() if self._is_column(name, value)}
        slices = None if self.slices is None else find_column("slices", self.slices)
        read = [_Read(source, columns, evaluator.task) for source in sources]
        told = [SliceRecorder(source, slices, evaluator.task) for source in read]
        evidence = evaluator.run(told if columns or slices is not None else sources, target, everywhere=everywhere)
        if slices is not None:
            evidence = _sliced(evidence, [one.whole(evaluator.collective) for one in told])
        whole = {name: torch.cat([one.whole(name, evaluator.collective) for one in read]) for name in columns}
        for name, value in asked.items():
            if value is not None and name not in columns and not isinstance(value, (str, Focal)):
                possible = [source.split for source in sources if source.failed or name == "protected"]
                whole[name] = _by_id(name, value, evidence, possible, strict=known)
        aside = (
            evidence.targeted & (whole["set_aside"] > 0) if "set_aside" in whole else ~torch.ones_like(evidence.passed)
        )
        evidence = replace(evidence, targeted=evidence.targeted & ~aside, weight=_costs(evidence, whole))
        return (self._weighed(evidence, whole.get("importance")) if known else evidence), aside

    def _weighed(self, evidence: SampleResults, importance: Tensor | None) -> SampleResults:
        if isinstance(self.importance, Focal) or self.importance == "focal":
            importance = (self.importance if isinstance(self.importance, Focal) else Focal()).weigh(evidence)
        if importance is None:
            return evidence
        wrong = evidence.targeted & ~(importance.isfinite() & (importance > 0))
        if wrong.any():
            raise ConfigurationError(
                explain(
                    f"`importance` is {float(importance[wrong][0])} for {int(wrong.sum())} failed samples "
                    f"({_some(evidence, wrong)}).",
                    "give finite numbers above 0; leave failures that do not count out of the `target`.",
                )
            )
        return normalised(replace(evidence, weight=torch.where(evidence.targeted, importance, evidence.weight)))

    def _is_column(self, name: str, value: Any) -> bool:
        word = isinstance(value, str) and value in WORDS.get(name, ())
        return value is not None and not word and not isinstance(value, (Mapping, list, tuple, Focal))


class _Read:
    """A source that notes columns of its batches in passing."""

    def __init__(self, source: Source, columns: Mapping[str, Column], task: Task) -> None:
        self.source, self.columns, self.task = source, columns, task
        self.found: dict[str, list[Tensor]] = {name: [] for name in columns}
        self.at: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            for name, column in self.columns.items():
                self.found[name].append(numbers(name, column, batch, self.task.label(batch.target)))
            self.at.append(batch.position)
            yield batch

    def whole(self, name: str, collective: Collective) -> Tensor:
        """The column of all ranks in the order of the source, float64."""
        mine = torch.cat(self.found[name]) if self.found[name] else torch.zeros(0, dtype=torch.float64)
        at = torch.cat(self.at) if self.at else torch.zeros(0, dtype=torch.int64)
        values, places = torch.cat(collective.gather(mine)), torch.cat(collective.gather(at))
        return values[places.argsort()]


def _sliced(evidence: SampleResults, told: Sequence[tuple[tuple[str, ...], Tensor]]) -> SampleResults:
    """The evidence with the slices of all splits, a slice of one name being the same one."""
    names = tuple(sorted({name for own, _ in told for name in own}))
    groups = []
    for own, group in told:
        numbers_ = torch.tensor([*(names.index(name) for name in own), -1])
        groups.append(numbers_[group])
    return replace(evidence, names=names, group=torch.cat(groups))


def _costs(evidence: SampleResults, whole: Mapping[str, Tensor]) -> Tensor:
    """What breaking costs, `N`: 1 where nothing is said, infinite where a sample is protected."""
    asked = whole.get("protected")
    if asked is None:
        return evidence.weight
    # A mark, such as a bool, protects.
    marks = bool(((asked == 0) | (asked == 1)).all())
    cost = torch.where(asked > 0, torch.inf, 1.0) if marks else asked
    wrong = evidence.passed & ~((cost >= 1) & (cost.isinf() | (cost == cost.round())))
    if wrong.any():
        raise ConfigurationError(
            explain(
                f"`protected` is {float(cost[wrong][0])} for {int(wrong.sum())} passed samples "
                f"({_some(evidence, wrong)}).",
                "give bools, or whole numbers from 1: how many other samples it counts for; infinity protects.",
            )
        )
    return torch.where(evidence.passed, cost, 1.0)


def _by_id(argument: str, value: Any, evidence: SampleResults, splits: Sequence[str], *, strict: bool) -> Tensor:
    """`N` float64 from ids, alone or by split, with values or not; 1 or 0 where nothing is said."""
    found = torch.full((len(evidence),), 1.0 if argument == "importance" else 0.0, dtype=torch.float64)
    if isinstance(value, Mapping) and argument == "protected" and not all(_is_ids(v) for v in value.values()):
        found += 1  # numbers, not marks
    named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if not named and len(splits) != 1 and strict:
        raise ConfigurationError(
            explain(
                f"`{argument}`: the ids may be of any of {list(splits)}.",
                f"say of which: `{argument}={{{splits[0]!r}: ...}}`."
                if splits
                else "mark the data that have failures.",
            )
        )
    tables = value if named else {split: value for split in splits[:1] if strict}
    for split, own in tables.items():
        if split not in evidence.splits:
            if strict and argument != "protected":
                raise ConfigurationError(
                    explain(f"`{argument}` names the split {split!r}.", f"there are {list(evidence.splits)}.")
                )
            continue
        pairs = own.items() if isinstance(own, Mapping) else ((i, 1.0) for i in own)
        place = {index: row for row, index in enumerate(evidence.index[evidence.of(split)].tolist())}
        start = evidence.start(split)
        for index, number in pairs:
            if index not in place:
                raise ConfigurationError(
                    explain(
                        f"`{argument}`: {split!r} data have no sample {index!r}.",
                        "ids are positions in the data set, as reports give them.",
                    )
                )
            found[start + place[index]] = float(number)
    return found


def _is_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _some(evidence: SampleResults, rows: Tensor) -> str:
    return "; ".join(f"{split}: {ids[:5]}" for split, ids in evidence.ids(rows).items() if ids)
