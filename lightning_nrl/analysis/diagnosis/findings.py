"""The findings of a diagnosis."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from lightning_nrl._utils.json_records import null_is

Fixable = Literal["yes", "no", "undecided", "not tried"]


@dataclass(frozen=True)
class FoundSample:
    """A known sample: its split, its position in the data set, and its class, which is -1 if the
    task has none.
    """

    split: str
    id: int
    label: int


@dataclass(frozen=True)
class TargetFinding(FoundSample):
    """One targeted failure. A fix is a change of the last Linear that repairs this target and
    breaks
    no known sample.

    Attributes:
        margin: distance from being right, at most 0; NaN if the task has no margin.
        fixable: `yes` if a fix was found; `no` if every fix is proven to change the logits of
            passed samples by more than their own size; `undecided` if neither is known; `not tried`
            if no fix was searched for.
        change: size of the fix: the root mean square of its effect on the logits of passed samples,
            divided by the root mean square of these logits; NaN without a fix.
        agreement: share of the nearest passed samples that have the target's label; NaN if unknown.
    """

    prediction: int
    margin: float
    fixable: Fixable = "not tried"
    change: float = math.nan
    agreement: float = math.nan


@dataclass(frozen=True)
class Binding(FoundSample):
    """A passed sample that limits the fixes of `targets` targets: a fix that ignored the sample
    would break it.
    """

    margin: float
    targets: int


@dataclass(frozen=True)
class HeldOutCheck:
    """Effect of fixes on samples that they did not take into account. Each fix changes the last
    layer
    for one target.

    `repairs` is the number of fixes. On average, a fix breaks `broken` of `passed` passed samples
    and repairs `repaired` of the `others` other targets. `harmless` is the share of the fixes that
    break no sample.
    """

    repairs: int
    passed: int  # only samples of splits whose failures may be repaired
    broken: float
    others: int
    repaired: float
    harmless: float

    @property
    def rate(self) -> float:
        """Other targets repaired per broken sample. It is infinite if no sample breaks, NaN if both
        counts are 0.
        """
        if not self.broken:
            return math.inf if self.repaired else math.nan
        return self.repaired / self.broken


@dataclass(frozen=True)
class NeighbourMixing:
    """Histograms: of a sample's `k` nearest passed samples, the number that have the sample's
    label.
    """

    k: int
    targets: tuple[int, ...]  # item i: number of targets with i neighbours of their label
    passed: tuple[int, ...]  # item i: number of passed samples with i neighbours of their label

    def mean(self, group: Literal["targets", "passed"]) -> float:
        """Returns the mean share of neighbours with a sample's own label, from 0 to 1. NaN if the
        group is empty.
        """
        counts = getattr(self, group)
        total = sum(counts)
        return sum(i * n for i, n in enumerate(counts)) / (total * self.k) if total else math.nan


@dataclass(frozen=True)
class DoubtfulLabel(FoundSample):
    """A target with a doubtful label: the model and the nearest passed samples agree on another
    class.
    """

    prediction: int
    agreed: float  # share of the nearest passed samples that have the predicted class
    lead: float  # logit of the predicted class minus the logit of the label


@dataclass(frozen=True)
class LayerCapacity:
    """First-order estimate of what a change of a layer could do without harm to the passed samples
    nearest to failing.

    Attributes:
        room: how far a small change can raise a target's margin if none of these passed samples may
            lose margin, divided by how far it can without this condition; from 0 to 1, mean over
            targets.
        change: size of the smallest change that repairs a target and breaks none of these passed
            samples, relative to the layer's norm; median over targets, infinite if there is no such
            change.
    """

    layer: str
    kind: str
    weights: int
    room: float
    change: float = field(metadata=null_is(math.inf))


@dataclass(frozen=True)
class Cost:
    """Estimated seconds of a method on this machine, to a factor of about two. `how` says what the
    method does.
    """

    method: str
    seconds: float
    how: str
