"""Diagnosis: what can be known of a repair before it is searched, as data, JSON, Markdown, a table and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_nrl._utils.serialize import dumps, plain
from lightning_nrl.report.document import Page, Shown
from lightning_nrl.report.repair_report import installed_versions

__all__ = ["Binding", "Check", "Cost", "Diagnosis", "Doubt", "LayerRoom", "Mixing", "TargetFinding", "Verdict"]

Verdict = Literal["yes", "no", "undecided", "not tried"]


@dataclass(frozen=True)
class TargetFinding:
    """One failure that is to be repaired.

    Attributes:
        split: where it is from.
        id: its position in the data set.
        label: its class; -1 where the task has none.
        prediction: the class that the model gives it.
        margin: how far it is from being right, at most 0; NaN where the task has no margin.
        fixable: whether the last Linear can repair it alone at zero known regressions. `no` is a proof: a change that
            does it would have to be larger than the logits themselves.
        change: how large a change does it, in parts of the logits (root mean square on passed samples); NaN if none is
            known.
        agreement: share of its nearest passed samples that have its label; NaN if that is not known.
    """

    split: str
    id: int
    label: int
    prediction: int
    margin: float
    fixable: Verdict = "not tried"
    change: float = math.nan
    agreement: float = math.nan


@dataclass(frozen=True)
class Binding:
    """A passed sample that stands in the way of repairs.

    Attributes:
        split: where it is from.
        id: its position in the data set.
        label: its class.
        margin: how far it is from being wrong.
        targets: how many targets it binds: their smallest repair would break it if it were not held.
    """

    split: str
    id: int
    label: int
    margin: float
    targets: int


@dataclass(frozen=True)
class Check:
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
class Mixing:
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
class Doubt:
    """A target whose label looks wrong.

    Attributes:
        split: where it is from.
        id: its position in the data set.
        label: the label that it has.
        prediction: the class that its neighbours and the model give it.
        agreed: share of its neighbours of that class.
        lead: of the predicted class's logit over the label's.
    """

    split: str
    id: int
    label: int
    prediction: int
    agreed: float
    lead: float


@dataclass(frozen=True)
class LayerRoom:
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
    change: float


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
class Diagnosis(Shown):
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
    check: Check | None = None
    mixing: Mixing | None = None
    doubts: tuple[Doubt, ...] = ()
    layers: tuple[LayerRoom, ...] = ()
    costs: tuple[Cost, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    def count(self, fixable: Verdict) -> int:
        """How many targets have this verdict."""
        return sum(target.fixable == fixable for target in self.targets)

    @property
    def roomiest(self) -> LayerRoom | None:
        """The layer that repairs a target by the smallest change of itself; None if no layer was looked at."""
        return min(self.layers, key=lambda layer: layer.change, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, text and numbers, with the counts that follow from the targets."""
        return {**plain(self), "fixable": {verdict: self.count(verdict) for verdict in get_args(Verdict)}}

    def to_json(self) -> str:
        """Strict JSON: a number that is not finite is null."""
        return dumps(self.to_dict()) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Diagnosis:
        """Reads what `to_dict` gives. What it does not know is left out, so that later versions can be read."""
        own = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        for name, kind in LISTS.items():
            own[name] = tuple(_read(kind, item) for item in own.get(name, ()))
        for name, kind in PARTS.items():
            own[name] = None if own.get(name) is None else _read(kind, own[name])
        own["notes"] = tuple(own.get("notes", ()))
        return cls(**own)

    @classmethod
    def from_json(cls, text: str) -> Diagnosis:
        """Reads what `to_json` gives; a null in place of a number is NaN, of a layer's change infinite."""
        return cls.from_dict(json.loads(text))

    def to_table(self) -> Page:
        """The advice and the tables, for rich's `print`."""
        from lightning_nrl.analysis.diagnosis.diagnosis_tables import page

        return page(self)

    def to_markdown(self) -> str:
        """The same for a reviewer, with the positions of all samples that are named."""
        from lightning_nrl.analysis.diagnosis.diagnosis_tables import page

        return page(self, everything=True).markdown()

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws the targets' margins, neighbourhoods and layers.

        Args:
            path: a file to save it to, such as `diagnosis.png`.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        from lightning_nrl.analysis.diagnosis.diagnosis_plot import draw_diagnosis

        figure = draw_diagnosis(self)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


LISTS: dict[str, type] = {
    "targets": TargetFinding,
    "binding": Binding,
    "doubts": Doubt,
    "layers": LayerRoom,
    "costs": Cost,
}
PARTS: dict[str, type] = {"check": Check, "mixing": Mixing}


def _read(kind: type[Any], data: Mapping[str, Any]) -> Any:
    own = {f.name: data[f.name] for f in fields(kind) if f.name in data}
    lost = math.inf if kind is LayerRoom else math.nan
    for f in fields(kind):
        if f.type == "float" and own.get(f.name, 0.0) is None:
            own[f.name] = lost
        elif isinstance(own.get(f.name), Sequence) and not isinstance(own[f.name], str):
            own[f.name] = tuple(own[f.name])
    return kind(**own)
