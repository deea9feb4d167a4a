"""Diagnosis: what can be known of a repair before it is searched, as data and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning_nrl._utils.json_records import null_is
from lightning_nrl.analysis.diagnosis.diagnosis_page import draw_diagnosis, page_of_diagnosis
from lightning_nrl.report import Page, Report, installed_versions
from lightning_nrl.report._figures import Plotted
from lightning_nrl.report._formatting import rough_percent, rough_time

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


DOUBTED_SHARE = 0.2
"""Share of targets with doubtful labels from which on labels come first."""

MIN_EXCHANGE_RATE = 2.0
"""Others repaired for each one broken from which on a repair of the last layer is worth its unseen breaks."""

MAX_CHANGE_RATIO = 4.0
"""Times the easiest layer's change that the last layer may need: both are medians over few targets."""

MAX_SMALL_CHANGE = 0.5
"""A change of a layer by half of its norm is no small one: the first-order figures do not hold there."""


def advise(found: Diagnosis) -> str:
    """The advice. The rules are few and in order: labels, then the last layer, then the network, then data."""
    if not found.known["targeted"]:
        return "Nothing to repair: no failed sample is in the target."
    if not found.known["passed"]:
        return "Get data: no known sample passes, so there is nothing to keep and nothing to compare with."
    if all(math.isnan(target.margin) for target in found.targets):
        return "Use method='auto', which is the swarm here: the task has no margins, so little can be said before."
    n, doubts = found.known["targeted"], len(found.doubts)
    if doubts < max(1, DOUBTED_SHARE * n):
        return _method(found)
    return (
        f"Look at labels first: those of {doubts:,} of {n:,} targets may be wrong, since neighbours and model "
        f"agree on another class. Then: {_method(found)}"
    )


def _method(found: Diagnosis) -> str:
    head, check, best, mixing = found.head, found.check, found.easiest_layer, found.mixing
    times = {cost.method: rough_time(cost.seconds) for cost in found.costs}
    own = next((layer for layer in found.layers if layer.layer == head), None)
    alone, tried = found.count("yes"), len(found.targets) - found.count("not tried")
    near = own is None or best is None or own.change <= MAX_CHANGE_RATIO * best.change
    worth = check is not None and not check.rate < MIN_EXCHANGE_RATE
    last = " ".join((_last_layer(alone, tried, check), _change(own, best))).strip()
    if 2 * alone > tried and near and worth:
        return (
            f"Use method='convex', {times.get('convex', 'seconds')}: the last layer ({head}) is likely to do. {last} "
            f"The default, method='auto', {times['auto']}, changes the whole network and may repair more."
        )
    if best is None:
        return f"Use the default, method='auto', {times['auto']}. {last}".strip()
    if best.change < MAX_SMALL_CHANGE:
        why = f": {_against(head, 2 * alone > tried, worth, check)}" if tried else ""
        return (
            f"Use the default, method='auto', on the whole network, {times['auto']}{why}. {last} "
            f"If one layer must do, take method='linearized' on {best.layer}, {times['linearized']}."
        )
    mixed = ""
    if mixing is not None:
        mixed = f" Of the nearest passed samples, {rough_percent(mixing.mean('targets'))} have a target's label."
    return f"Get more data like the targets and train on it: no layer repairs them by a small change. {last}{mixed}"


def _against(head: str | None, enough: bool, worth: bool, check: HeldOutCheck | None) -> str:
    """Why the last layer is not advised."""
    if not enough:
        return f"the last layer ({head}) is not enough"
    if check is None:
        return f"what the last layer ({head}) would break on other data is not known"
    if not worth:
        return f"the last layer ({head}) would break too much on other data"
    return f"the last layer ({head}) would have to change much more than others"


def _last_layer(alone: int, tried: int, check: HeldOutCheck | None) -> str:
    if not tried:
        return ""
    text = f"One at a time, it can fix {alone:,} of {tried:,} targets at zero known regressions"
    if check is None:
        return f"{text}."
    others = f"repairs {check.repaired:.1f} other targets and breaks {check.broken:.1f} passed samples"
    return f"{text}; on samples held out, fixing one {others}."


def _change(own: LayerCapacity | None, best: LayerCapacity | None) -> str:
    if best is None or best.change == math.inf:
        return ""
    text = f"A typical target needs a change of {best.layer} by {rough_percent(best.change)} of its norm"
    if own is None or own == best:
        return f"{text}."
    if own.change == math.inf:
        return f"{text}; none of {own.layer} does it."
    return f"{text}, of {own.layer} by {rough_percent(own.change)}."
