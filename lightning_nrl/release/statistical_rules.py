"""Release rules with a test or a confidence: better, limited rates, no slice worse."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, Literal, cast

from torch import Tensor

from lightning_nrl._utils.formatting import exact_percent, percent
from lightning_nrl.errors import check_choice, check_real
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.evaluation.stats import (
    check_confidence,
    evidence_of,
    largest_fall,
    least_number,
    p_worse,
    percent_down,
    percent_up,
    show_confidence,
    upper_limit,
)
from lightning_nrl.release.calibration import Calibration
from lightning_nrl.release.model_pair import ModelPair
from lightning_nrl.release.rules import Part, SplitRule, accuracies

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
        return not _is_better(counts)

    def missing(self, counts: FlipCounts) -> str:
        if counts.repaired < counts.broken:
            return ""
        n_more = least_number(1, lambda n: _is_better(counts, n))
        return f"{n_more:,} more repaired samples would do, if no more break"

    def sentences(self, parts: Sequence[Part]) -> list[str]:
        sentences = []
        for part in parts:
            counts = part.counts
            flips = f"{counts.repaired:,} repaired, {counts.broken:,} broken"
            evidence = evidence_of(counts.repaired, counts.broken)
            sentences.append(f"{part.name}: {flips}, {evidence} ({accuracies(counts)})")
        return sentences


def _is_better(counts: FlipCounts, n_more: int = 0) -> bool:
    return evidence_of(counts.repaired + n_more, counts.broken) == "better"


@dataclass(frozen=True)
class LimitRule(SplitRule):
    """Base class of rules that limit a number, such as a rate, in each split, or each slice too.

    The number's upper confidence limit must not exceed `highest`. It is valid for future data only
    if neither training nor the choice of a model used the split. With several splits or slices, the
    confidence holds: a model above the limit in one must pass there too, with a probability of
    1 - confidence at most.
    """

    limit: float
    confidence: float = 0.95
    each_slice: bool = False
    splits: tuple[str, ...] = ()

    is_statistical = True
    name: ClassVar[str]  # of the rule in its text
    outcome: ClassVar[str]  # what must not grow if more samples are given
    beyond: ClassVar[str] = "above the limit of"

    def __post_init__(self) -> None:
        super().__post_init__()
        hint = "write 0.01 for 1 %, for instance."
        check_real("limit", self.limit, "share between 0 and 1", hint, above=0, below=1)
        check_confidence(self.confidence)

    @property
    def highest(self) -> float:
        """Largest allowed number, in (0, 1)."""
        return self.limit

    @abstractmethod
    def estimate(self, counts: FlipCounts) -> float:
        """Returns the number as the samples have it."""

    @abstractmethod
    def upper(self, counts: FlipCounts) -> float:
        """Returns the number's upper confidence limit."""

    @abstractmethod
    def describe(self, counts: FlipCounts) -> str:
        """Describes what the samples show."""

    def limited(self, upper: float) -> str:
        """Formats the upper confidence limit."""
        return f"at most {percent_up(upper)}"

    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        return self.upper(counts) > self.highest

    def missing(self, counts: FlipCounts) -> str:
        if self.estimate(counts) - self.highest > 1e-9:  # more than rounding of `highest`
            return ""
        needed = f"{self.needed(counts):,} samples would do with no more {self.outcome}"
        return f"{needed}, there are {counts.n:,}"

    def needed(self, counts: FlipCounts) -> int:
        """Returns the number of samples that would do if the further ones stayed right."""

        def is_enough(n: int) -> bool:
            return self.upper(replace(counts, kept=counts.kept + n - counts.n)) <= self.highest

        return least_number(counts.n + 1, is_enough)

    def sentences(self, parts: Sequence[Part]) -> list[str]:
        sentences = []
        confidence = show_confidence(self.confidence)
        for _, parts_of_split in groupby(parts, lambda part: part.split):
            group = list(parts_of_split)
            highest = max(group, key=lambda part: self.upper(part.counts))
            above = [part for part in group if self.is_worse(part.counts, len(parts))]
            for part in above or [highest]:
                limited = self.limited(self.upper(part.counts))
                described = f"{part.name}: {self.describe(part.counts)}"
                sentences.append(f"{described}, with {confidence} confidence {limited}")
                if above:
                    sentences[-1] += f", {self.beyond} {exact_percent(self.limit)}"
            if not above and len(group) > 1:
                sentences[-1] += ", the least certain"
        return sentences

    @property
    def text(self) -> str:
        text = f"{self.name}:{exact_percent(self.limit)}"
        if self.each_slice:
            text = f"slice-{text}"
        if self.confidence != 0.95:
            text += f":{exact_percent(self.confidence)}"
        return text


class MaxNegativeFlipRate(LimitRule):
    """Requires in each split a negative flip rate (broken / all samples) of at most `limit`.

    The upper confidence bound of Clopper and Pearson (`evaluation.stats`) must not exceed `limit`.
    It is valid for future data only if neither training nor the choice of a model used the split.
    With several splits or slices, the confidence holds: a model above `limit` in one must pass
    there too, with a probability of 1 - confidence at most.

    Attributes:
        limit: largest allowed rate, in (0, 1).
        confidence: confidence of the rule, in [0.5, 1).
        each_slice: True if the limit applies to every slice too, not only to the whole split.
        splits: names of the splits; empty: all splits.

    Example:
        >>> print(MaxNegativeFlipRate(0.01, 0.99))
        nfr:1%:99%
    """

    name = "nfr"
    outcome = "broken"

    def estimate(self, counts: FlipCounts) -> float:
        return counts.broken / counts.n

    def upper(self, counts: FlipCounts) -> float:
        return upper_limit(counts.broken, counts.n, self.confidence)

    def describe(self, counts: FlipCounts) -> str:
        rate = percent(self.estimate(counts))
        return f"negative flip rate {rate} ({counts.broken:,} of {counts.n:,})"


class MinAccuracy(LimitRule):
    """Requires in each split an accuracy of the new model of at least `limit`.

    The old model does not matter. Confidence and bound are those of `MaxNegativeFlipRate`, for the
    rate of wrong samples.

    Attributes:
        limit: lowest allowed accuracy, in (0, 1).
        confidence: confidence of the rule, in [0.5, 1).
        each_slice: True if the limit applies to every slice too, not only to the whole split.
        splits: names of the splits; empty: all splits.

    Example:
        >>> print(MinAccuracy(0.95, each_slice=True))
        slice-floor:95%
    """

    name = "floor"
    outcome = "wrong"
    needs_right = False
    beyond = "below the floor of"

    @property
    def highest(self) -> float:
        return 1 - self.limit

    def estimate(self, counts: FlipCounts) -> float:
        return 1 - counts.accuracy_after

    def objections(self, pair: ModelPair) -> Tensor:
        return ~pair.after.right

    def upper(self, counts: FlipCounts) -> float:
        return upper_limit(counts.n - counts.right, counts.n, self.confidence)

    def describe(self, counts: FlipCounts) -> str:
        return f"accuracy {percent(counts.accuracy_after)} ({counts.right:,} of {counts.n:,})"

    def limited(self, upper: float) -> str:
        return f"at least {percent_down(1 - upper)}"


class IsNonInferior(LimitRule):
    """Requires in each split that the accuracy falls by at most `limit`.

    The upper confidence limit on the fall (`stats.largest_fall`) must not exceed `limit`.

    Attributes:
        limit: largest allowed fall, in (0, 1).
        confidence: confidence of the rule, in [0.5, 1).
        each_slice: True if the limit applies to every slice too, not only to the whole split.
        splits: names of the splits; empty: all splits.

    Example:
        >>> print(IsNonInferior(0.01))
        non-inferior:1%
    """

    name = "non-inferior"
    outcome = "flips"
    direction = "lower"

    def estimate(self, counts: FlipCounts) -> float:
        return (counts.broken - counts.repaired) / counts.n

    def upper(self, counts: FlipCounts) -> float:
        return max(0.0, self._fall(counts.repaired, counts.broken, counts.n))

    def _fall(self, repaired: int, broken: int, n: int) -> float:
        return largest_fall(repaired=repaired, broken=broken, n=n, confidence=self.confidence)

    def describe(self, counts: FlipCounts) -> str:
        flips = f"{counts.repaired:,} repaired, {counts.broken:,} broken of {counts.n:,}"
        return f"{accuracies(counts)} ({flips})"

    def limited(self, upper: float) -> str:
        return f"at most {points_up(upper)} {self.direction}"


class IsEquivalent(IsNonInferior):
    """Requires in each split that the accuracy falls or rises by at most `limit`.

    Two one-sided tests, each with `confidence`, must show this: one as in `IsNonInferior`, and the
    same for a rise. The arguments are those of `IsNonInferior`.

    Example:
        >>> print(IsEquivalent(0.01))
        equivalent:1%
    """

    name = "equivalent"
    direction = "lower or higher"

    def estimate(self, counts: FlipCounts) -> float:
        return abs(super().estimate(counts))

    def upper(self, counts: FlipCounts) -> float:
        return max(super().upper(counts), self._fall(counts.broken, counts.repaired, counts.n))


class MaxCalibrationRise(LimitRule):
    """Requires in each split that the expected calibration error rises by at most `limit`.

    The error has 15 bins. Its rise has a bootstrap interval (`release.calibration.Calibration`).

    Attributes:
        limit: largest allowed rise, in (0, 1).
        confidence: confidence of the rule, in [0.5, 1).
        each_slice: True if the limit applies to every slice too, not only to the whole split.
        splits: names of the splits; empty: all splits.

    Example:
        >>> print(MaxCalibrationRise(0.01))
        calibration:1%
    """

    name = "calibration"
    outcome = "calibration error"

    def count(self, pair: ModelPair, rows: Tensor) -> Calibration:
        return Calibration.of_pair(pair, rows, self.confidence)

    def estimate(self, counts: FlipCounts) -> float:
        calibration = cast(Calibration, counts)
        return calibration.after - calibration.before

    def upper(self, counts: FlipCounts) -> float:
        upper = self.estimate(counts) + cast(Calibration, counts).excess
        # A bootstrap does not know the samples of a kind that is missing among these.
        return max(upper, upper_limit(0, counts.n, self.confidence))

    def needed(self, counts: FlipCounts) -> int:
        least = least_number(1, lambda n: upper_limit(0, n, self.confidence) <= self.limit)
        # The interval shrinks with the square root of the number of samples.
        room = max(self.limit - self.estimate(counts), 1e-4)
        return max(least, math.ceil(counts.n * (cast(Calibration, counts).excess / room) ** 2))

    def describe(self, counts: FlipCounts) -> str:
        calibration = cast(Calibration, counts)
        errors = f"{percent(calibration.before)}, now {percent(calibration.after)}"
        return f"expected calibration error {errors}"

    def limited(self, upper: float) -> str:
        return f"at most {points_up(upper)} higher"


def points_up(share: float) -> str:
    """Formats a limit on a difference of shares in percentage points, rounded up."""
    return percent_up(share).replace("%", "points")


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
            worse, in (0, 0.5].
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
        hint = "write 0.05 for 5 %, which means 95 % confidence."
        kind = "error probability of at most 50 %"
        check_real("level", self.level, kind, hint, above=0, most=0.5)

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
