"""The findings of a diagnosis."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from lightning_nrl._utils.json_records import null_is

Fixable = Literal["yes", "no", "undecided", "not tried"]


@dataclass(frozen=True)
class FoundSample:
    """A known sample: its split, its position in the data set, and its class, -1 if the task has none."""

    split: str
    id: int
    label: int


@dataclass(frozen=True)
class TargetFinding(FoundSample):
    """One targeted failure.

    Attributes:
        margin: distance from being right, at most 0; NaN if the task has no margin.
        fixable: whether the last Linear can repair it alone without known regressions. `no` is a proof: the change
            would have to be larger than the logits themselves.
        change: size of the change relative to the logits (root mean square on passed samples), or NaN.
        agreement: share of its nearest passed samples with the same label, or NaN.
    """

    prediction: int
    margin: float
    fixable: Fixable = "not tried"
    change: float = math.nan
    agreement: float = math.nan


@dataclass(frozen=True)
class Binding(FoundSample):
    """A passed sample that limits the smallest repair of some `targets`, which would break it."""

    margin: float
    targets: int


@dataclass(frozen=True)
class HeldOutCheck:
    """Effect of repairs of one target on unconstrained samples: an exchange rate for the last layer.

    On average, one of the `repairs` breaks `broken` of the `passed` samples that were left out, from the data with
    failures, and repairs `repaired` of the `others`, the other targets. The share `harmless` breaks none.
    """

    repairs: int
    passed: int
    broken: float
    others: int
    repaired: float
    harmless: float

    @property
    def rate(self) -> float:
        """Others repaired per broken sample; infinite if none is broken, NaN if nothing changes."""
        if not self.broken:
            return math.inf if self.repaired else math.nan
        return self.repaired / self.broken


@dataclass(frozen=True)
class NeighbourMixing:
    """Counts of targets and passed samples by how many of their `k` nearest passed samples share their label."""

    k: int
    targets: tuple[int, ...]
    passed: tuple[int, ...]

    def mean(self, group: Literal["targets", "passed"]) -> float:
        """Computes the mean agreement, from 0 to 1; NaN without samples."""
        counts = getattr(self, group)
        total = sum(counts)
        return sum(i * n for i, n in enumerate(counts)) / (total * self.k) if total else math.nan


@dataclass(frozen=True)
class DoubtfulLabel(FoundSample):
    """A target with a doubtful label: the share of neighbours that agree with the prediction, and its lead."""

    prediction: int
    agreed: float
    lead: float


@dataclass(frozen=True)
class LayerCapacity:
    """The room of a layer, to first order, on a sample of targets and of near passed samples.

    Attributes:
        room: share, from 0 to 1, of the margin gained by a small change that is left if no near passed sample may lose
            any; mean over targets.
        change: smallest change that repairs a target and breaks none of them, relative to the layer's norm; median over
            targets, infinite if there is none.
    """

    layer: str
    kind: str
    weights: int
    room: float
    change: float = field(metadata=null_is(math.inf))


@dataclass(frozen=True)
class Cost:
    """Seconds of a method on this machine, to a factor of about two, and what they include."""

    method: str
    seconds: float
    how: str
