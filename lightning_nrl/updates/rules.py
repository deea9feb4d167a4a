"""Release rules: conditions that a new model must satisfy to replace the old one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_nrl._utils.formatting import percent
from lightning_nrl.data.targets import Predicate, Target, target_in
from lightning_nrl.errors import ConfigurationError, check_choice, check_kind
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.gate.gates import Gate, allowance
from lightning_nrl.records.stats import (
    Bound,
    check_confidence,
    evidence_of,
    p_worse,
    percent_up,
    show_confidence,
)
from lightning_nrl.updates.model_pair import ModelPair, check_splits
from lightning_nrl.updates.predictions import Ids, parse_ids


@dataclass(frozen=True)
class RuleResult:
    """Result of one rule: if the new model satisfies it, and why."""

    rule: str  # the rule as text
    passed: bool  # True if the new model satisfies the rule
    reason: str
    ids: Ids = field(
        default_factory=dict
    )  # data-set positions of the broken samples that violate the rule, by split


class Rule(ABC):
    """Base class of release rules. Write your own as a frozen dataclass with `check` and `__str__`."""

    @abstractmethod
    def check(self, pair: ModelPair) -> RuleResult:
        """Judges the new model. Raises a `ConfigurationError` if the rule cannot be applied to the
        samples.
        """

    @abstractmethod
    def __str__(self) -> str:
        """Returns the rule as text, as in a report."""

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        """Called before any model runs. `splits` are the splits of the data; `sliced` is True if
        slices are given.

        Raises a `ConfigurationError` if the rule names another split, or needs slices that are not
        given.
        """
        return None

    @property
    def targets(self) -> tuple[Target, ...]:
        """Targets whose samples the rule reads. `ModelPair.marked` gets a mask for each target."""
        return ()


class Part(NamedTuple):
    """Samples that a rule counts together: a whole split or one slice of it."""

    split: str
    name: str  # of the split, or of the split and the slice
    rows: Tensor  # N bool, mask of the samples
    counts: FlipCounts


class SplitRule(Rule):
    """Base class of rules that count flips in splits or their slices."""

    splits: tuple[str, ...]
    whole_splits: bool = True  # True if the rule counts flips in each whole split
    each_slice: bool = False  # True if the rule counts flips in each slice

    @property
    @abstractmethod
    def text(self) -> str:
        """The rule as text, without the names of its splits."""

    def __post_init__(self) -> None:
        names = (self.splits,) if isinstance(self.splits, str) else self.splits
        fits = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
        check_kind("splits", self.splits, fits, "list of splits", "splits=('test',)")
        object.__setattr__(self, "splits", tuple(names))

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        check_splits(str(self), self.splits, splits)
        if self.each_slice and not sliced:
            raise ConfigurationError(
                f"the rule `{self}` needs slices, but `slices` is not given.",
                "say which slice each sample is in, such as `slices=lambda batch: batch[1]`, or leave the rule out.",
            )

    @abstractmethod
    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        """True if a part (split or slice) with these counts violates the rule, which checks
        `n_parts` parts in all.
        """

    @abstractmethod
    def sentences(self, parts: Sequence[Part]) -> list[str]:
        """Returns sentences about the parts, without full stops. `RuleResult.reason` joins them."""

    def check(self, pair: ModelPair) -> RuleResult:
        parts = self._parts(pair)
        worse = [part for part in parts if self.is_worse(part.counts, len(parts))]
        bad = torch.zeros(len(pair.after), dtype=torch.bool)
        for part in worse:
            bad |= part.rows
        sentences, splits = self.sentences(parts), {part.split for part in parts}
        outside = sum(pair.after.sizes[pair.splits.index(s)] for s in splits) - sum(
            part.counts.n for part in parts
        )
        if outside > 0:
            sentences.append(f"{outside:,} samples are in no slice and were not checked")
        return RuleResult(str(self), not worse, f"{'. '.join(sentences)}.", _broken(pair, bad))

    def _parts(self, pair: ModelPair) -> list[Part]:
        found = []
        for split in check_splits(str(self), self.splits, pair.splits):
            slices = pair.slices_of(split) if self.each_slice else {"": pair.rows(split)}
            if not any(rows.any() for rows in slices.values()):
                what = "sample in a slice" if self.each_slice else "sample"
                raise ConfigurationError(
                    f"the rule `{self}` has nothing to check: `{split}` has no {what}.",
                    f"leave the rule out, or name the splits that it is for: `{self.text} in SPLIT`.",
                )
            named = {split: pair.rows(split)} if self.whole_splits else {}
            if self.each_slice:
                named |= {f"{split}, slice {name!r}": rows for name, rows in slices.items()}
            found += [
                Part(split, name, rows, pair.flips.counts(rows)) for name, rows in named.items()
            ]
        return found

    def __str__(self) -> str:
        return f"{self.text} in {', '.join(self.splits)}" if self.splits else self.text


@dataclass(frozen=True)
class AtMostBroken(SplitRule):
    """Allows in each split at most as many broken samples as a gate allows.

    Attributes:
        gate: a `Gate`, or its text. `instance` allows no broken sample; `accuracy` allows as many
            as are repaired, so that the accuracy does not fall; `tolerance:3` allows 3;
            `tolerance:1%` allows 1 % of the passed samples.
        splits: names of the splits; empty: all splits.

    Example:
        >>> print(AtMostBroken("accuracy", splits=("test",)))
        accuracy in test
    """

    gate: Gate | str = "instance"
    splits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        gate = Gate.parse(self.gate)
        gate.excess_of(FlipCounts(0, 0, 0, 0))  # Raises an error for a gate that needs a target.
        object.__setattr__(self, "gate", gate)

    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        return Gate.parse(self.gate).excess_of(counts) > 0

    def sentences(self, parts: Sequence[Part]) -> list[str]:
        return [
            f"{part.name}: {part.counts.broken:,} of {part.counts.passed:,} that were right broke; "
            f"{allowance(Gate.parse(self.gate), part.counts)} ({_accuracies(part.counts)})"
            for part in parts
        ]

    @property
    def text(self) -> str:
        return str(self.gate)


@dataclass(frozen=True)
class IsBetter(SplitRule):
    """Requires that in each split significantly more samples are repaired than broken, by the sign
    test at 5 %.
    """

    splits: tuple[str, ...] = ()
    text = "better"

    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        return evidence_of(counts.repaired, counts.broken) != "better"

    def sentences(self, parts: Sequence[Part]) -> list[str]:
        return [
            f"{part.name}: {part.counts.repaired:,} repaired, {part.counts.broken:,} broken, "
            f"{evidence_of(part.counts.repaired, part.counts.broken)} ({_accuracies(part.counts)})"
            for part in parts
        ]


@dataclass(frozen=True)
class MaxNegativeFlipRate(SplitRule):
    """Requires in each split a negative flip rate (broken / all samples) of at most `limit`, with a
    confidence.

    The upper confidence bound of Clopper and Pearson (`records.stats`) must not exceed `limit`. The
    bound is valid for future data only if neither training nor the choice of a model used the
    split. With several splits or slices, the confidence holds: a model above `limit` in one must
    pass there too, with a probability of 1 - confidence at most.

    Attributes:
        limit: largest allowed rate, in (0, 1).
        confidence: confidence of the rule, in (0, 1).
        each_slice: True if the limit applies to every slice too, not only to the whole split.
        splits: names of the splits; empty: all splits.

    Example:
        >>> print(MaxNegativeFlipRate(0.01, 0.99))
        nfr:1%:99%
    """

    limit: float
    confidence: float = 0.95
    each_slice: bool = False
    splits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_confidence(self.limit, "limit")
        check_confidence(self.confidence)

    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        return self._bound(counts).upper > self.limit

    def sentences(self, parts: Sequence[Part]) -> list[str]:
        sentences = []
        for _, group in groupby(parts, lambda part: part.split):
            bounds = {part.name: self._bound(part.counts) for part in group}
            above = [name for name, bound in bounds.items() if bound.upper > self.limit]
            highest = max(bounds, key=lambda name: bounds[name].upper)
            sentences += [self._line(name, bounds[name]) for name in above or [highest]]
            if not above and len(bounds) > 1:
                sentences[-1] += ", the highest"
        return sentences

    def _bound(self, counts: FlipCounts) -> Bound:
        return Bound.of(counts.broken, counts.n, self.confidence)

    def _line(self, name: str, bound: Bound) -> str:
        text = (
            f"{name}: negative flip rate {percent(bound.rate)} ({bound.broken:,} of {bound.n:,}), with "
            f"{show_confidence(self.confidence)} confidence at most {percent_up(bound.upper)}"
        )
        if bound.upper <= self.limit:
            return text
        needed = math.ceil(math.log(1 - self.confidence) / math.log1p(-self.limit))
        few = f"; a pass needs {needed:,} samples, even if none breaks" if bound.n < needed else ""
        return f"{text}, above the limit of {_exact_percent(self.limit)}{few}"

    @property
    def text(self) -> str:
        sure = "" if self.confidence == 0.95 else f":{_exact_percent(self.confidence)}"
        return f"{'slice-' if self.each_slice else ''}nfr:{_exact_percent(self.limit)}{sure}"


@dataclass(frozen=True)
class NoSliceWorse(SplitRule):
    """Requires that no slice gets worse.

    Attributes:
        by: `count`, for a test suite: a slice is worse if fewer of its samples are right than with
            the old model. `test`, for future data: a slice is worse if the p-value of its one-sided
            exact sign test is below `level` divided by the number of slices. The result names
            slices that are too small for this test; `MaxNegativeFlipRate(each_slice=True)` limits
            what breaks in such slices.
        level: for `test`, largest probability that the rule refuses a model although no slice is
            worse, in (0, 1).
        splits: names of the splits; empty: all splits.

    Example:
        >>> print(NoSliceWorse("count"))
        slices:count
    """

    by: Literal["test", "count"] = "test"
    level: float = 0.05
    splits: tuple[str, ...] = ()

    whole_splits = False
    each_slice = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("by", self.by, ("test", "count"))
        check_confidence(self.level, "level")

    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        if self.by == "count":
            return counts.broken > counts.repaired
        return p_worse(counts.broken, counts.repaired) < self.level / n_parts

    def sentences(self, parts: Sequence[Part]) -> list[str]:
        n = len(parts)
        sentences = [
            self._line(part.name, part.counts, n) for part in parts if self.is_worse(part.counts, n)
        ]
        sentences = sentences or [f"none of {n:,} slices is worse by {self.by}"]
        mute = [part.name for part in parts if p_worse(part.counts.passed, 0) >= self.level / n]
        if self.by == "test" and mute:
            named = "; ".join(mute[:5]) + (f" and {len(mute) - 5:,} more" if mute[5:] else "")
            sentences.append(
                f"the test can say nothing about {len(mute):,} slices with too few samples ({named})"
            )
        return sentences

    def _line(self, name: str, counts: FlipCounts, n_parts: int) -> str:
        p = p_worse(counts.broken, counts.repaired)
        test = f"; p = {p:.2g}, below {self.level / n_parts:.2g}" if self.by == "test" else ""
        return f"{name} is worse: {counts.broken:,} broke, {counts.repaired:,} repaired ({_accuracies(counts)}{test})"

    @property
    def text(self) -> str:
        level = "" if self.level == 0.05 or self.by == "count" else f":{_exact_percent(self.level)}"
        return f"slices{':count' if self.by == 'count' else level}"


@dataclass(frozen=True, eq=False)
class ProtectedIntact(Rule):
    """Requires that no protected sample breaks.

    Attributes:
        ids: protected samples: lists of data-set positions by split, a single list if there is one
            split, or a CSV file with the columns `split` and `id`.
        where: more protected samples: a `Target`, its text (`label 3`), a predicate on raw batches,
            or its address.

    Example:
        >>> print(ProtectedIntact({"test": [3, 17]}))
        protected:2 samples
    """

    ids: Ids | Sequence[int] | str | Path | None = None
    where: Target | Predicate | str | None = None
    _ids: Ids = field(init=False, repr=False)

    def __post_init__(self) -> None:
        where = target_in(self.where) if isinstance(self.where, str) else None
        if where is None and self.where is not None:
            where = self.where if isinstance(self.where, Target) else Target.where(self.where)
        object.__setattr__(self, "where", where)
        ids = parse_ids(self.ids)
        if where is None and not any(ids.values()):
            raise ConfigurationError(
                "`ProtectedIntact` protects nothing.",
                "give `ids={'test': [3, 17]}`, a CSV file of ids, or `where`.",
            )
        object.__setattr__(self, "_ids", ids)

    @property
    def targets(self) -> tuple[Target, ...]:
        return (self.where,) if isinstance(self.where, Target) else ()

    def check_data(self, splits: Sequence[str], sliced: bool) -> None:
        check_splits("ids", tuple(self._by_split(splits)), splits)

    def check(self, pair: ModelPair) -> RuleResult:
        chosen = self._chosen(pair)
        counts = pair.flips.counts(chosen)
        text = f"{counts.broken:,} of {counts.passed:,} protected samples that were right broke"
        wrong = counts.failing + counts.repaired
        rest = (
            f"; {wrong:,} more were wrong before, {counts.repaired:,} of these are right now"
            if wrong
            else ""
        )
        return RuleResult(str(self), not counts.broken, f"{text}{rest}.", _broken(pair, chosen))

    def _by_split(self, splits: Sequence[str]) -> Ids:
        if "" not in self._ids:
            return self._ids
        if len(splits) != 1:
            raise ConfigurationError(
                f"`ids` names no split, but the data have {list(splits)}.",
                f"write ids={{{splits[0]!r}: [...]}}.",
            )
        return {splits[0]: self._ids[""]}

    def _chosen(self, pair: ModelPair) -> Tensor:
        chosen = torch.zeros(len(pair.after), dtype=torch.bool)
        for split, ids in self._by_split(pair.splits).items():
            wanted, rows = torch.as_tensor(list(ids), dtype=torch.int64), pair.after.of(split)
            there = pair.after.index[rows]
            missing = wanted[~torch.isin(wanted, there)].tolist()
            if missing:
                raise ConfigurationError(
                    f"`ids`: {len(missing):,} protected samples are not in `{split}` ({missing[:5]}).",
                    "give positions in the data set; missing samples cannot be checked.",
                )
            chosen[rows] |= torch.isin(there, wanted)
        for target in self.targets:
            if not pair.marked[target].any():
                raise ConfigurationError(
                    f"`where`: '{target}' selects none of {len(chosen):,} samples, so nothing would be protected.",
                    "give data that have such samples, or leave the rule out.",
                )
            chosen |= pair.marked[target]
        return chosen

    def __str__(self) -> str:
        n = sum(len(rows) for rows in self._ids.values())
        listed = f"{n:,} sample{'s' if n != 1 else ''}" if n else ""
        listed = str(self.ids) if isinstance(self.ids, (str, Path)) else listed
        return "protected:" + " and ".join(filter(None, (listed, *map(str, self.targets))))


def _broken(pair: ModelPair, rows: Tensor) -> Ids:
    return {split: ids for split, ids in pair.after.ids(rows & pair.flips.broken).items() if ids}


def _accuracies(counts: FlipCounts) -> str:
    return f"accuracy {percent(counts.accuracy_before)}, now {percent(counts.accuracy_after)}"


def _exact_percent(share: float) -> str:
    return f"{100 * share:.12g}%"
