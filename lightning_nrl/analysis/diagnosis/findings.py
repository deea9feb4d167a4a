"""The findings of a diagnosis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Fixable = Literal["yes", "no", "undecided", "not tried"]


@dataclass(frozen=True)
class FoundSample:
    """A known sample: its split, its position in the data set, and its class.

    The class is -1 if the task has no classes.
    """

    split: str
    id: int
    label: int


@dataclass(frozen=True)
class TargetFinding(FoundSample):
    """One targeted failure, and whether the last Linear can fix it.

    A fix is a change of the last Linear that repairs this target and breaks no known sample.

    Attributes:
        margin: distance from being right, at most 0; NaN if the task has no margin.
        fixable: `yes` if a fix was found; `no` if every fix is proven to change the logits of
            passed samples by more than their own size; `undecided` if neither is known; `not tried`
            if no fix was searched for.
        change: size of the fix: the root mean square of its effect on the logits of passed samples,
            divided by the root mean square of these logits; NaN without a fix.
    """

    prediction: int
    margin: float
    fixable: Fixable = "not tried"
    change: float = math.nan


@dataclass(frozen=True)
class Binding(FoundSample):
    """A passed sample that `targets` fixes would break if they ignored it."""

    margin: float
    targets: int


@dataclass(frozen=True)
class HeldOutCheck:
    """Effect of fixes on held-out samples. Each fix changes the last layer for one target.

    `repairs` is the number of fixes. On average, a fix breaks `broken` of `passed` passed samples
    and repairs `repaired` of the `other_targets`. `harmless` is the share of the fixes that
    break no sample.
    """

    repairs: int
    passed: int  # only samples of splits whose failures may be repaired
    broken: float
    other_targets: int
    repaired: float
    harmless: float

    @property
    def rate(self) -> float:
        """Other targets repaired per broken sample: infinite if none breaks, NaN if both are 0."""
        if self.broken:
            return self.repaired / self.broken
        if self.repaired:
            return math.inf
        return math.nan


@dataclass(frozen=True)
class NeighbourMixing:
    """Mean share of a sample's `k` nearest passed samples that have the sample's label."""

    k: int
    targets: float  # mean over targets
    passed: float  # mean over passed samples


@dataclass(frozen=True)
class DoubtfulLabel(FoundSample):
    """A target with a doubtful label: the model and its neighbours agree on another class."""

    prediction: int
    agreed: float  # share of the nearest passed samples that have the predicted class
    lead: float  # logit of the predicted class minus the logit of the label


@dataclass(frozen=True)
class LayerCapacity:
    """First-order estimate of the smallest useful change of a layer.

    Attributes:
        change: size of the smallest change that repairs a target and breaks none of the passed
            samples nearest to failing, relative to the layer's norm; median over targets, infinite
            if there is no such change.
    """

    layer: str
    kind: str
    weights: int
    change: float

    def __post_init__(self) -> None:
        if math.isnan(self.change):  # in JSON, infinity is null
            object.__setattr__(self, "change", math.inf)
