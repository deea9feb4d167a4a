"""Release rules with a test or a confidence: better, limited rates, no slice worse."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Literal

from torch import Tensor

from lightning_nrl._utils.formatting import percent
from lightning_nrl.errors import check_choice
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.records.stats import (
    Bound,
    check_confidence,
    evidence_of,
    least_samples,
    p_worse,
    percent_down,
    percent_up,
    show_confidence,
)
from lightning_nrl.updates.model_pair import ModelPair
from lightning_nrl.updates.rules import Part, SplitRule, accuracies, exact_percent

LISTED_SLICES = 5


@dataclass(frozen=True)
class IsBetter(SplitRule):
    """Requires that in each split significantly more samples are repaired than broken.

    The test is the sign test at 5 %.
    """

    splits: tuple[str, ...] = ()
    text = "better"
    is_statistical = True
    needs_right = False

    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        return evidence_of(counts.repaired, counts.broken) != "better"

    def missing(self, counts: FlipCounts) -> str:
        if counts.repaired <= counts.broken:
            return ""
        n_more = 1
        while evidence_of(counts.repaired + n_more, counts.broken) != "better":
            n_more += 1
        return f"{n_more:,} more repaired samples would do, if no more break"

    def sentences(self, parts: Sequence[Part]) -> list[str]:
        sentences = []
        for part in parts:
            counts = part.counts
            flips = f"{counts.repaired:,} repaired, {counts.broken:,} broken"
            evidence = evidence_of(counts.repaired, counts.broken)
            sentences.append(f"{part.name}: {flips}, {evidence} ({accuracies(counts)})")
        return sentences


@dataclass(frozen=True)
class _RateRule(SplitRule):
    """Base class of rules that limit the rate of bad samples in each split, or each slice too.

    The upper confidence bound of Clopper and Pearson (`records.stats`) on the rate must not exceed
    `highest`. The bound is valid for future data only if neither training nor the choice of a model
    used the split. With several splits or slices, the confidence holds: a model above the limit in
    one must pass there too, with a probability of 1 - confidence at most.
    """

    limit: float
    confidence: float = 0.95
    each_slice: bool = False
    splits: tuple[str, ...] = ()

    is_statistical = True
    name: ClassVar[str]  # of the rule in its text
    outcome: ClassVar[str]  # of a bad sample

    def __post_init__(self) -> None:
        super().__post_init__()
        check_confidence(self.limit, "limit")
        check_confidence(self.confidence)

    @property
    @abstractmethod
    def highest(self) -> float:
        """Largest allowed rate, in (0, 1)."""

    @abstractmethod
    def bad(self, counts: FlipCounts) -> int:
        """Counts bad samples."""

    @abstractmethod
    def describe(self, bound: Bound) -> str:
        """Describes a rate, its bound, and the limit if the bound exceeds it."""

    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        return self._bound(counts).upper > self.highest

    def missing(self, counts: FlipCounts) -> str:
        if self.bad(counts) - self.highest * counts.n > 1e-9:  # more than rounding of `highest`
            return ""
        n = least_samples(self.bad(counts), self.highest, self.confidence)
        return f"{n:,} samples would do with no more {self.outcome}, there are {counts.n:,}"

    def sentences(self, parts: Sequence[Part]) -> list[str]:
        sentences = []
        for _, parts_of_split in groupby(parts, lambda part: part.split):
            group = list(parts_of_split)
            highest = max(group, key=lambda part: self._bound(part.counts).upper)
            above = [part for part in group if self.is_worse(part.counts, len(parts))]
            for part in above or [highest]:
                sentences.append(f"{part.name}: {self.describe(self._bound(part.counts))}")
            if not above and len(group) > 1:
                sentences[-1] += ", the least certain"
        return sentences

    def _bound(self, counts: FlipCounts) -> Bound:
        return Bound.of(self.bad(counts), counts.n, self.confidence)

    @property
    def text(self) -> str:
        text = f"{self.name}:{exact_percent(self.limit)}"
        if self.each_slice:
            text = f"slice-{text}"
        if self.confidence != 0.95:
            text += f":{exact_percent(self.confidence)}"
        return text


class MaxNegativeFlipRate(_RateRule):
    """Requires in each split a negative flip rate (broken / all samples) of at most `limit`.

    The upper confidence bound of Clopper and Pearson (`records.stats`) must not exceed `limit`. It
    is valid for future data only if neither training nor the choice of a model used the split. With
    several splits or slices, the confidence holds: a model above `limit` in one must pass there
    too, with a probability of 1 - confidence at most.

    Attributes:
        limit: largest allowed rate, in (0, 1).
        confidence: confidence of the rule, in (0, 1).
        each_slice: True if the limit applies to every slice too, not only to the whole split.
        splits: names of the splits; empty: all splits.

    Example:
        >>> print(MaxNegativeFlipRate(0.01, 0.99))
        nfr:1%:99%
    """

    name = "nfr"
    outcome = "broken"

    @property
    def highest(self) -> float:
        return self.limit

    def bad(self, counts: FlipCounts) -> int:
        return counts.broken

    def describe(self, bound: Bound) -> str:
        text = (
            f"negative flip rate {percent(bound.rate)} ({bound.broken:,} of {bound.n:,}), "
            f"with {show_confidence(self.confidence)} confidence at most {percent_up(bound.upper)}"
        )
        if bound.upper > self.limit:
            text += f", above the limit of {exact_percent(self.limit)}"
        return text


class MinAccuracy(_RateRule):
    """Requires in each split an accuracy of the new model of at least `limit`.

    The old model does not matter. Confidence and bound are those of `MaxNegativeFlipRate`, for the
    rate of wrong samples.

    Attributes:
        limit: lowest allowed accuracy, in (0, 1).
        confidence: confidence of the rule, in (0, 1).
        each_slice: True if the limit applies to every slice too, not only to the whole split.
        splits: names of the splits; empty: all splits.

    Example:
        >>> print(MinAccuracy(0.95, each_slice=True))
        slice-floor:95%
    """

    name = "floor"
    outcome = "wrong"
    needs_right = False

    @property
    def highest(self) -> float:
        return 1 - self.limit

    def bad(self, counts: FlipCounts) -> int:
        return counts.broken + counts.failing

    def objections(self, pair: ModelPair) -> Tensor:
        return ~pair.after.right

    def describe(self, bound: Bound) -> str:
        text = (
            f"accuracy {percent(1 - bound.rate)} ({bound.n - bound.broken:,} of {bound.n:,}), "
            f"with {show_confidence(self.confidence)} confidence at least "
            f"{percent_down(1 - bound.upper)}"
        )
        if bound.upper > self.highest:
            text += f", below the floor of {exact_percent(self.limit)}"
        return text


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

    @property
    def is_statistical(self) -> bool:  # type: ignore[override]
        return self.by == "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("by", self.by, ("test", "count"))
        check_confidence(self.level, "level")

    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        if self.by == "count":
            return counts.broken > counts.repaired
        return _p_of(counts) < self.level / n_parts

    def sentences(self, parts: Sequence[Part]) -> list[str]:
        n = len(parts)
        sentences = []
        too_small = []
        for part in parts:
            counts = part.counts
            if self.is_worse(counts, n):
                flips = f"{counts.broken:,} broke, {counts.repaired:,} repaired"
                evidence = accuracies(counts)
                if self.by == "test":
                    evidence += f"; p = {_p_of(counts):.2g}, below {self.level / n:.2g}"
                sentences.append(f"{part.name} is worse: {flips} ({evidence})")
            # Not even if all its right samples broke would the test find such a slice worse.
            if p_worse(repaired=0, broken=counts.passed) >= self.level / n:
                too_small.append(part.name)
        if not sentences:
            sentences.append(f"none of {n:,} slices is worse by {self.by}")
        if too_small and self.by == "test":
            names = "; ".join(too_small[:LISTED_SLICES])
            if len(too_small) > LISTED_SLICES:
                names += f" and {len(too_small) - LISTED_SLICES:,} more"
            slices = f"{len(too_small):,} slices with too few samples ({names})"
            sentences.append(f"the test can say nothing about {slices}")
        return sentences

    @property
    def text(self) -> str:
        if self.by == "count":
            return "slices:count"
        if self.level == 0.05:
            return "slices"
        return f"slices:{exact_percent(self.level)}"


def _p_of(counts: FlipCounts) -> float:
    return p_worse(repaired=counts.repaired, broken=counts.broken)
