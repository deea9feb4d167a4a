"""Diagnosis: what can be known of a repair before it is searched, as data and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning_nrl._utils.serialize import null_is
from lightning_nrl.analysis.diagnosis.diagnosis_plot import draw_diagnosis
from lightning_nrl.analysis.diagnosis.diagnosis_tables import page_of_diagnosis
from lightning_nrl.report import Page, Report, installed_versions
from lightning_nrl.report._figures import Plotted

__all__ = [
    "Binding",
    "Cost",
    "Diagnosis",
    "DoubtfulLabel",
    "Fixable",
    "HeldOutCheck",
    "LayerCapacity",
    "NeighbourMixing",
    "TargetFinding",
]

Fixable = Literal["yes", "no", "undecided", "not tried"]


@dataclass(frozen=True)
class FoundSample:
    """A known sample: its split, its position in the data set, and its class, -1 where the task has none."""

    split: str
    id: int
    label: int


@dataclass(frozen=True)
class TargetFinding(FoundSample):
    """One failure that is to be repaired.

    Attributes:
        prediction: the class that the model gives it.
        margin: how far it is from being right, at most 0; NaN where the task has no margin.
        fixable: whether the last Linear can repair it alone at zero known regressions. `no` is a proof: a change that
            does it would have to be larger than the logits themselves.
        change: how large a change does it, in parts of the logits (root mean square on passed samples); NaN if none is
            known.
        agreement: share of its nearest passed samples that have its label; NaN if that is not known.
    """

    prediction: int
    margin: float
    fixable: Fixable = "not tried"
    change: float = math.nan
    agreement: float = math.nan


@dataclass(frozen=True)
class Binding(FoundSample):
    """A passed sample that stands in the way of repairs.

    Attributes:
        margin: how far it is from being wrong.
        targets: how many targets it binds: their smallest repair would break it if it were not held.
    """

    margin: float
    targets: int


@dataclass(frozen=True)
class HeldOutCheck:
    """What repairs of one target do to samples that they were not told of: an exchange rate for the last layer.

    Attributes:
        repairs: of how many targets.
        passed: passed samples from the data with failures, each left out of the constraints of some repairs.
        broken: of all these, how many one repair breaks, on average.
        others: other targets.
        repaired: of all these, how many one repair repairs too, on average.
        harmless: share of the repairs that break none of those left out.
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
    """How many of their `k` nearest passed samples have a sample's own label, before the last layer.

    Attributes:
        k: how many neighbours were asked.
        targets: `k + 1` counts of targets, by the number of neighbours that agree.
        passed: `k + 1` counts of passed samples, likewise; a sample where there are many.
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
    """A target whose label looks wrong.

    Attributes:
        prediction: the class that its neighbours and the model give it.
        agreed: share of its neighbours of that class.
        lead: of the predicted class's logit over the label's.
    """

    prediction: int
    agreed: float
    lead: float


@dataclass(frozen=True)
class LayerCapacity:
    """How much room a layer has, to first order, on a sample of targets and of near passed samples.

    Attributes:
        layer: dotted name.
        kind: such as `Linear`.
        weights: how many it has.
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
    """What a method would take.

    Attributes:
        method: its name.
        seconds: on this machine, to a factor of about two.
        how: what it is made of.
    """

    method: str
    seconds: float
    how: str


@dataclass(frozen=True)
class Diagnosis(Report, Plotted):
    """What can be known before a repair. `rich.print(diagnosis)` shows it as tables.

    Attributes:
        advice: what to do, with the reason in figures.
        target: which failures are to be repaired, in words.
        task: what right and wrong mean, in words.
        known: counts of known samples: `samples`, `passed`, `failed`, `targeted`.
        head: dotted name of the last Linear; None where none gives the logits.
        targets: what was found for each failure to be repaired.
        binding: passed samples that stand in the way, most often first.
        check: what repairs of the last layer do to samples that are held out; None if that could not be looked at.
        mixing: how mixed neighbourhoods are; None if that could not be looked at.
        doubts: targets whose label looks wrong, the surest first.
        layers: in the order of the model.
        costs: what each method would take.
        notes: what could not be looked at, and why.
        seconds: wall time by stage.
        versions: versions of the software by name.
    """

    advice: str
    target: str
    task: str
    known: Mapping[str, int]
    head: str | None = None
    targets: tuple[TargetFinding, ...] = ()
    binding: tuple[Binding, ...] = ()
    check: HeldOutCheck | None = None
    mixing: NeighbourMixing | None = None
    doubts: tuple[DoubtfulLabel, ...] = ()
    layers: tuple[LayerCapacity, ...] = ()
    costs: tuple[Cost, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    def page(self, full: bool = False) -> Page:
        return page_of_diagnosis(self, full)

    def figure(self) -> Any:
        return draw_diagnosis(self)

    def count(self, fixable: Fixable) -> int:
        """How many targets have this verdict."""
        return sum(target.fixable == fixable for target in self.targets)

    @property
    def easiest_layer(self) -> LayerCapacity | None:
        """The layer that repairs a target by the smallest change of itself; None if no layer was looked at."""
        return min(self.layers, key=lambda layer: layer.change, default=None)

    @property
    def derived(self) -> Mapping[str, object]:
        return {"fixable": {verdict: self.count(verdict) for verdict in get_args(Fixable)}}
