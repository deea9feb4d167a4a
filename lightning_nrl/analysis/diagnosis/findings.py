"""The findings of a diagnosis."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from lightning_nrl._utils.json_records import null_is

Fixable = Literal["yes", "no", "undecided", "not tried"]


@dataclass(frozen=True)
class FoundSample:
    """A known sample: its split, its position in the data set, and its class, which is -1 if the task has none."""

    split: str
    id: int
    label: int


@dataclass(frozen=True)
class TargetFinding(FoundSample):
    """One targeted failure. A fix is a change of the last Linear that repairs this target and breaks no known sample.

    Attributes:
        margin: distance from being right, at most 0; NaN if the task has no margin.
        fixable: `yes`: a fix was found. `no`: it is proven that a fix would change the logits by more than their size.
        change: size of the fix: its effect on the logits of passed samples, relative to these logits (root mean
            squares); NaN without a fix.
        agreement: share of the nearest passed samples that have the target's label; NaN if unknown.
    """

    prediction: int
    margin: float
    fixable: Fixable = "not tried"
    change: float = math.nan
    agreement: float = math.nan


@dataclass(frozen=True)
class Binding(FoundSample):
    """A passed sample that limits the fixes of `targets` targets: a fix that ignored the sample would break it."""

    margin: float
    targets: int


@dataclass(frozen=True)
class HeldOutCheck:
    """Effect of fixes by the last layer, each of one target, on samples that the fixes did not take into account.

    `repairs` is the number of fixes. On average, a fix breaks `broken` of `passed` passed samples, which come from the
    data with failures, and repairs `repaired` of `others` other targets. The share `harmless` of the fixes breaks none.
    """

    repairs: int
    passed: int
    broken: float
    others: int
    repaired: float
    harmless: float

    @property
    def rate(self) -> float:
        """Other targets repaired per broken sample. Infinite if no sample is broken, NaN if none is repaired either."""
        if not self.broken:
            return math.inf if self.repaired else math.nan
        return self.repaired / self.broken


@dataclass(frozen=True)
class NeighbourMixing:
    """`targets[i]` targets and `passed[i]` passed samples have the label of `i` of their `k` nearest passed samples."""

    k: int
    targets: tuple[int, ...]
    passed: tuple[int, ...]

    def mean(self, group: Literal["targets", "passed"]) -> float:
        """Returns the mean share of neighbours with a sample's own label, from 0 to 1. NaN if the group is empty."""
        counts = getattr(self, group)
        total = sum(counts)
        return sum(i * n for i, n in enumerate(counts)) / (total * self.k) if total else math.nan


@dataclass(frozen=True)
class DoubtfulLabel(FoundSample):
    """A target with a doubtful label: a share `agreed` of neighbours has the predicted class, which leads by `lead`."""

    prediction: int
    agreed: float
    lead: float


@dataclass(frozen=True)
class LayerCapacity:
    """What a layer could do for some targets without harm to the passed samples nearest to failing, to first order.

    Attributes:
        room: a small change of the layer raises a target's margin. This share of the rise, from 0 to 1, is left if none
            of the passed samples may lose margin; mean over targets.
        change: size of the smallest change that repairs a target and breaks none of the passed samples, relative to the
            layer's norm; median over targets, infinite if there is no such change.
    """

    layer: str
    kind: str
    weights: int
    room: float
    change: float = field(metadata=null_is(math.inf))


@dataclass(frozen=True)
class Cost:
    """Estimated seconds of a method on this machine, to a factor of about two; `how` says what the method does."""

    method: str
    seconds: float
    how: str
