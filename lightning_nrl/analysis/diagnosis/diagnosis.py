"""The result of a diagnosis as data, a page and a figure."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_high
from typing import TYPE_CHECKING, get_args

from lightning_nrl._utils.formatting import rough_percent, rough_time
from lightning_nrl.analysis.diagnosis.findings import (
    Binding,
    DoubtfulLabel,
    Fixable,
    HeldOutCheck,
    LayerCapacity,
    NeighbourMixing,
    TargetFinding,
)
from lightning_nrl.report import Page, Report, figures
from lightning_nrl.report.page import Block, FactList, Heading, Row, Table, Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LISTED_ROWS = 8  # most samples and layers in a table of the page; the JSON has all
VERDICT_STYLES: dict[Fixable, tuple[str, str]] = {
    "yes": ("can be fixed", figures.BLUE),
    "no": ("cannot be fixed", figures.RED),
    "undecided": ("undecided", figures.ORANGE),
    "not tried": ("not tried", figures.GREY),
}


@dataclass(frozen=True)
class Diagnosis(Report, figures.Plotted):
    """A diagnosis before a repair. `rich.print(diagnosis)` shows it as tables.

    Attributes:
        advice: what to do, with the reason in figures.
        target: the failures to repair, in words.
        task: the task, which defines when a sample is right, in words.
        known: counts of known samples: `samples`, `passed`, `failed`, `targeted`.
        head: dotted name of the last Linear; None if it could not be analysed, for a reason in
            `notes`.
        targets: for each target, whether a change of the last layer alone can repair it.
        binding: passed samples that limit what the last layer can repair, most limiting first.
        check: effect of repairs of the last layer on held-out samples; None if unknown.
        mixing: labels of the passed samples nearest to the targets; None if unknown.
        doubts: targets with doubtful labels, most doubtful first.
        layers: how far each layer must change.
        costs: estimated seconds of each method on this machine, fastest first, to a factor of about
            two.
        notes: checks that were not possible, with reasons.
        seconds: wall time by stage.
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
    costs: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def count(self, fixable: Fixable) -> int:
        return sum(target.fixable == fixable for target in self.targets)

    @property
    def n_tried(self) -> int:
        return len(self.targets) - self.count("not tried")

    @property
    def easiest_layer(self) -> LayerCapacity | None:
        """The layer with the smallest `LayerCapacity.change`. None if no layer was compared."""
        return min(self.layers, key=lambda layer: layer.change, default=None)

    @property
    def head_layer(self) -> LayerCapacity | None:
        return next((layer for layer in self.layers if layer.layer == self.head), None)

    @property
    def derived(self) -> Mapping[str, object]:
        return {"fixable": {verdict: self.count(verdict) for verdict in get_args(Fixable)}}

    def page(self, full: bool = False) -> Page:
        most = sys.maxsize if full else LISTED_ROWS
        blocks: list[Block] = [Heading("Before a repair", 1), Text(self.advice), _facts(self)]
        if self.n_tried:
            blocks += [Heading("Each target alone"), *_targets_alone(self)]
            blocks += [Heading("Passed samples in the way"), *_binding(self.binding, most)]
        if self.doubts:
            blocks += [Heading("Labels worth a look"), *_doubts(self.doubts, most)]
        if self.layers:
            blocks += [Heading("Change by layer"), *_layers(self, most)]
        if self.costs:
            text = (
                "Times on this machine, to a factor of about two, with all evaluations. "
                "`max_time` limits them."
            )
            times = [(method, rough_time(seconds)) for method, seconds in self.costs.items()]
            blocks += [Heading("What a repair would take"), Text(text), FactList(times)]
        if self.notes:
            blocks += [Heading("Not checked"), *map(Text, self.notes)]
        return Page(blocks)

    def figure(self) -> Figure:
        figure = figures.new_figure(7, 4.6)
        axes = figure.subplots()
        title = "{targeted:,} failures to repair: can the last layer fix each?"
        axes.set_title(title.format(**self.known), fontsize=10, color=figures.INK, loc="left")
        values, colours, labels = [], [], []
        for verdict, (name, colour) in VERDICT_STYLES.items():
            margins = []
            for target in self.targets:
                if target.fixable == verdict and math.isfinite(target.margin):
                    margins.append(target.margin)
            if margins:
                values.append(margins)
                colours.append(colour)
                labels.append(f"{name} ({len(margins):,})")
        if values:
            axes.hist(values, bins=24, stacked=True, color=colours, label=labels)
            axes.legend(frameon=False, fontsize=9)
        else:
            axes.text(0.5, 0.5, "no margin is known", color=figures.GREY, ha="center")
        axes.locator_params(axis="y", integer=True)
        figures.style_axes(
            axes, "margin: label's logit above the largest other", "targets", grid="y"
        )
        return figure


def _table(columns: Sequence[tuple[str, str]], rows: Sequence[Row], most: int) -> Table:
    shown = list(rows[:most])
    if len(rows) > most:
        shown.append(Row(f"and {len(rows) - most:,} more", ("",) * len(columns)))
    return Table(columns, shown)


def _facts(diagnosis: Diagnosis) -> FactList:
    facts = [("target", diagnosis.target)]
    if diagnosis.task != "Multiclass":
        facts.append(("right means", diagnosis.task))
    counts = (
        "{samples:,}: {passed:,} passed, {failed:,} failed, {targeted:,} of these to be repaired"
    )
    facts.append(("known samples", counts.format(**diagnosis.known)))
    mixing, check = diagnosis.mixing, diagnosis.check
    if mixing is not None:
        text = (
            f"of the {mixing.k} passed samples nearest to a target, "
            f"{rough_percent(mixing.targets)} have its label; of those nearest to a passed sample, "
            f"{rough_percent(mixing.passed)}"
        )
        facts.append(("neighbourhoods", text))
    if check is not None:
        text = (
            f"fixing one target by the last layer repairs {check.repaired:.1f} of "
            f"{check.other_targets:,} others and breaks {check.broken:.1f} of {check.passed:,} "
            f"passed samples left out of the fix; {rough_percent(check.harmless)} of such fixes "
            "break none"
        )
        facts.append(("held out", text))
    return FactList(facts)


def _targets_alone(diagnosis: Diagnosis) -> tuple[Block, ...]:
    text = (
        f"Each target is fixed alone, by a change of the last layer ({diagnosis.head}) without "
        "known regressions. The change is relative to the logits of passed samples."
    )
    facts = [("targets", f"{len(diagnosis.targets):,}")]
    for verdict, (name, _) in VERDICT_STYLES.items():
        n = diagnosis.count(verdict)
        if n or verdict in ("yes", "no"):
            facts.append((name, f"{n:,}"))
    changes = [target.change for target in diagnosis.targets if target.fixable == "yes"]
    if changes:
        facts.append(("change needed, median", rough_percent(median_high(changes))))
    return Text(text), FactList(facts)


def _binding(binding: Sequence[Binding], most: int) -> tuple[Block, ...]:
    if not binding:
        return (Text("None: the smallest fix of each target breaks no known passed sample."),)
    text = (
        "Each sample limits or prevents fixes of some targets: a fix that ignored the sample would "
        "break it."
    )
    rows = []
    for sample in binding:
        cells = (str(sample.label), f"{sample.margin:.2g}", f"{sample.targets:,}")
        rows.append(Row(f"{sample.split} {sample.id}", cells))
    columns = (("class", ""), ("margin", "logits"), ("limits", "targets"))
    return Text(text), _table(columns, rows, most)


def _doubts(doubts: Sequence[DoubtfulLabel], most: int) -> tuple[Block, ...]:
    text = (
        "Neighbours and model agree on another class, and the model is sure. A wrong label looks "
        "like that, and so does a new kind of input."
    )
    rows = []
    for doubt in doubts:
        agreed = rough_percent(doubt.agreed)
        cells = (str(doubt.label), str(doubt.prediction), agreed, f"{doubt.lead:.1f}")
        rows.append(Row(f"{doubt.split} {doubt.id}", cells))
    columns = (("label", "given"), ("looks", "like"), ("neighbours", "agree"), ("lead", "logits"))
    return Text(text), _table(columns, rows, most)


def _layers(diagnosis: Diagnosis, most: int) -> tuple[Block, ...]:
    text = (
        "The smallest change that fixes a typical target, relative to the layer's norm: a "
        "first-order estimate. Less is better."
    )
    rows: list[Row] = []
    for layer in sorted(diagnosis.layers, key=lambda layer: layer.change):
        cells = (layer.kind, f"{layer.weights:,}", rough_percent(layer.change))
        rows.append(Row(layer.layer, cells, "" if rows else "good"))
    columns = (("kind", ""), ("weights", ""), ("change", "needed"))
    return Text(text), _table(columns, rows, most)
