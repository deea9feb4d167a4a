"""The findings of a diagnosis, one record a kind."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from lightning_nrl._utils.json_records import null_is

Fixable = Literal["yes", "no", "undecided", "not tried"]


@dataclass(frozen=True)
class FoundSample:
    """A known sample: its split, its position in the data set, and its class, -1 where the task has none."""

    split: str
    id: int
    label: int


@dataclass(frozen=True)
class TargetFinding(FoundSample):
    """One targeted failure.

    Attributes:
        margin: how far it is from being right, at most 0; NaN where the task has no margin.
        fixable: whether the last Linear can repair it alone at zero known regressions. `no` is a proof: a change that
            does it would have to be larger than the logits themselves.
        change: size of the change that does it, in parts of the logits (root mean square on passed samples), or NaN.
        agreement: share of its nearest passed samples that have its label, or NaN.
    """

    prediction: int
    margin: float
    fixable: Fixable = "not tried"
    change: float = math.nan
    agreement: float = math.nan


@dataclass(frozen=True)
class Binding(FoundSample):
    """A passed sample with its margin, and how many `targets` it binds: their smallest repair would break it."""

    margin: float
    targets: int


@dataclass(frozen=True)
class HeldOutCheck:
    """Effect of repairs of one target on samples that were not constrained: an exchange rate for the last layer.

    On average one of the `repairs` breaks `broken` of the `passed` samples that were left out, from the data with
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
        """Others repaired for each one broken; infinite if none is broken, NaN if nothing happens."""
        if not self.broken:
            return math.inf if self.repaired else math.nan
        return self.repaired / self.broken


@dataclass(frozen=True)
class NeighbourMixing:
    """Counts of targets and of passed samples by how many of their `k` nearest passed samples have their label.

    `targets` and `passed` have `k + 1` counts each, in the space before the last layer.
    """

    k: int
    targets: tuple[int, ...]
    passed: tuple[int, ...]

    def mean(self, group: Literal["targets", "passed"]) -> float:
        """Mean agreement, from 0 to 1; NaN without samples."""
        counts = getattr(self, group)
        total = sum(counts)
        return sum(i * n for i, n in enumerate(counts)) / (total * self.k) if total else math.nan


@dataclass(frozen=True)
class DoubtfulLabel(FoundSample):
    """A target whose label looks wrong: a share of its neighbours agree with the prediction, whose logit leads."""

    prediction: int
    agreed: float
    lead: float


@dataclass(frozen=True)
class LayerCapacity:
    """How much room a layer has, to first order, on a sample of targets and of near passed samples.

    Attributes:
        room: from 0 to 1: of the margin that a small change could gain for a target, the share left if none of the near
            passed samples may lose any; the mean over targets.
        change: the smallest change that repairs a target and breaks none of them, in parts of the layer's norm; the
            median over targets. Infinite if none does.
    """

    layer: str
    kind: str
    weights: int
    room: float
    change: float = field(metadata=null_is(math.inf))


@dataclass(frozen=True)
class Cost:
    """Seconds that a method takes on this machine, to a factor of about two, and what they are made of."""

    method: str
    seconds: float
    how: str
