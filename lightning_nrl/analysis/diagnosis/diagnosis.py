"""The result of a diagnosis as data, a page and a figure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median_high
from typing import Any, Literal, get_args

from lightning_nrl._utils.formatting import rough_percent, rough_time
from lightning_nrl.analysis.diagnosis.findings import (
    Binding,
    Cost,
    DoubtfulLabel,
    Fixable,
    HeldOutCheck,
    LayerCapacity,
    NeighbourMixing,
    TargetFinding,
)
from lightning_nrl.report import Page, Report
from lightning_nrl.report import figures as figures
from lightning_nrl.report.page import Block, FactList, Heading, Row, Table, Text


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
        layers, costs: what a change of each layer could do, and how long each method would take.
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
    costs: tuple[Cost, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def page(self, full: bool = False) -> Page:
        most = 10**9 if full else LISTED_ROWS
        blocks: list[Block] = [
            Heading("Before a repair", 1),
            Text(self.advice),
            FactList(_facts(self)),
        ]
        if any(target.fixable != "not tried" for target in self.targets):
            text = (
                f"Each target is fixed alone, by a change of the last layer ({self.head}) without known regressions. "
                "The change is relative to the logits of passed samples."
            )
            blocks += [Heading("Each target alone"), Text(text), _alone(self, most)]
            blocks += [Heading("Passed samples in the way"), *_binding(self.binding, most)]
        if self.doubts:
            text = (
                "Neighbours and model agree on another class, and the model is sure. A wrong label looks like that, "
                "and so does a new kind of input."
            )
            rows = [
                Row(
                    f"{d.split} {d.id}",
                    (str(d.label), str(d.prediction), rough_percent(d.agreed), f"{d.lead:.1f}"),
                )
                for d in self.doubts
            ]
            columns = (
                ("label", "given"),
                ("looks", "like"),
                ("neighbours", "agree"),
                ("lead", "logits"),
            )
            blocks += [
                Heading("Labels worth a look"),
                Text(text),
                Table(columns, _truncated(rows, most)),
            ]
        if self.layers:
            text = (
                "Change: the smallest that fixes a typical target, relative to the layer's norm; less is better. "
                "Room: a small change raises the margin of a target; this share of the rise is left if no passed "
                "sample near the border may lose margin. Both are first-order estimates."
            )
            blocks += [Heading("Room by layer"), Text(text), _layers(self, most)]
        if self.costs:
            costs = tuple(
                (cost.method, f"{rough_time(cost.seconds)}: {cost.how}") for cost in self.costs
            )
            text = "Times on this machine, to a factor of about two, with all evaluations. `max_time` limits them."
            blocks += [Heading("What a repair would take"), Text(text), FactList(costs)]
        if self.notes:
            blocks += [Heading("Not checked"), *(Text(note) for note in self.notes)]
        return Page(tuple(blocks))

    def figure(self) -> Any:
        figure = figures.new_figure(13, max(4.6, 1.6 + 0.2 * min(len(self.layers), PLOTTED_LAYERS)))
        title = (
            "Before a repair: {targeted:,} failures to repair, {passed:,} passed samples to keep"
        )
        figure.suptitle(title.format(**self.known), color=figures.INK, fontsize=12)
        panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
        _margins(panels[0], self)
        _mixing(panels[1], self.mixing)
        _room(panels[2], self)
        return figure

    def count(self, fixable: Fixable) -> int:
        return sum(target.fixable == fixable for target in self.targets)

    @property
    def easiest_layer(self) -> LayerCapacity | None:
        """The layer with the smallest `LayerCapacity.change`. None if no layer was compared."""
        return min(self.layers, key=lambda layer: layer.change, default=None)

    @property
    def derived(self) -> Mapping[str, object]:
        return {"fixable": {verdict: self.count(verdict) for verdict in get_args(Fixable)}}


LISTED_ROWS = 8  # most samples, classes and layers in a table of the page; the JSON has all


def _truncated(
    rows: Sequence[Row], most: int, more: str = "more", last: str = ""
) -> tuple[Row, ...]:
    rest = [Row(f"and {len(rows) - most:,} {more}", (*[""] * (len(rows[0].cells) - 1), last))]
    return (*rows[:most], *rest[: len(rows) > most])


def _facts(diagnosis: Diagnosis) -> tuple[tuple[str, str], ...]:
    counts = (
        "{samples:,}: {passed:,} passed, {failed:,} failed, {targeted:,} of these to be repaired"
    )
    right = {} if diagnosis.task == "Multiclass" else {"right means": diagnosis.task}
    facts = {"target": diagnosis.target, **right, "known samples": counts.format(**diagnosis.known)}
    mixing, check = diagnosis.mixing, diagnosis.check
    if mixing is not None:
        facts["neighbourhoods"] = (
            f"of the {mixing.k} passed samples nearest to a target, {rough_percent(mixing.mean('targets'))} have "
            f"its label; of those nearest to a passed sample, {rough_percent(mixing.mean('passed'))}"
        )
    if check is not None:
        facts["held out"] = (
            f"fixing one target by the last layer repairs {check.repaired:.1f} of {check.others:,} others and "
            f"breaks {check.broken:.1f} of {check.passed:,} passed samples left out of the fix; "
            f"{rough_percent(check.harmless)} of such fixes break none"
        )
    return tuple(facts.items())


def _alone(diagnosis: Diagnosis, most: int) -> Table:
    groups: dict[tuple[str, str], list[TargetFinding]] = {("all", ""): list(diagnosis.targets)}
    counts = Counter(target.label for target in diagnosis.targets)
    shown = sorted(label for label, _ in counts.most_common(most))
    if len(counts) > 1:
        groups |= {
            (str(label), "class"): [t for t in diagnosis.targets if t.label == label]
            for label in shown
        }
    if rest := [target for target in diagnosis.targets if target.label not in shown]:
        groups[f"{len(counts) - len(shown):,} other", "classes"] = rest

    def row(
        label: str, text: Callable[[list[TargetFinding]], str], tone: Literal["", "gain"] = ""
    ) -> Row:
        return Row(label, tuple(map(text, groups.values())), tone)

    def with_verdict(verdict: Fixable) -> Callable[[list[TargetFinding]], str]:
        return lambda group: f"{sum(target.fixable == verdict for target in group):,}"

    rows = [
        row("targets", lambda group: f"{len(group):,}"),
        row("can be fixed", with_verdict("yes"), "gain"),
        row("cannot be fixed", with_verdict("no")),
        *(
            row(verdict, with_verdict(verdict))
            for verdict in get_args(Fixable)[2:]
            if diagnosis.count(verdict)
        ),
        row(
            "change needed, median", lambda group: _of_known(median_high, (t.change for t in group))
        ),
        row(
            "neighbours with its label, mean",
            lambda group: _of_known(fmean, (t.agreement for t in group)),
        ),
    ]
    return Table(tuple(groups), tuple(rows))


def _of_known(average: Callable[[list[float]], float], values: Iterable[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return rough_percent(average(known) if known else math.nan)


def _binding(found: Sequence[Binding], most: int) -> tuple[Block, ...]:
    if not found:
        return (Text("None: the smallest fix of each target breaks no known passed sample."),)
    text = "Each sample limits or prevents fixes of some targets: a fix that ignored the sample would break it."
    rows = [
        Row(f"{b.split} {b.id}", (str(b.label), f"{b.margin:.2g}", f"{b.targets:,}")) for b in found
    ]
    last = f"<= {found[most].targets:,}" if len(found) > most else ""
    columns = (("class", ""), ("margin", "logits"), ("limits", "targets"))
    return Text(text), Table(columns, _truncated(rows, most, last=last))


def _layers(diagnosis: Diagnosis, most: int) -> Table:
    best = sorted(diagnosis.layers, key=lambda layer: layer.change)[:most]
    shown = [layer for layer in diagnosis.layers if layer in best or layer.layer == diagnosis.head]
    others = [layer for layer in diagnosis.layers if layer not in shown]
    rows = [
        Row(
            layer.layer,
            (
                layer.kind,
                f"{layer.weights:,}",
                rough_percent(layer.room),
                rough_percent(layer.change),
            ),
            "gain" if layer == diagnosis.easiest_layer else "",
        )
        for layer in (*shown, *others)
    ]
    columns = (("kind", ""), ("weights", ""), ("room", ""), ("change", "needed"))
    return Table(columns, _truncated(rows, len(shown), "that need more"))


VERDICT_STYLES: dict[Fixable, tuple[str, str]] = {
    "yes": ("can be fixed", figures.BLUE),
    "no": ("cannot be fixed", figures.RED),
    "undecided": ("undecided", figures.ORANGE),
    "not tried": ("not tried", figures.GREY),
}
PLOTTED_LAYERS = 40
LAYERS_TITLE = "Room: the layer that must change least"


def _margins(axes: Any, diagnosis: Diagnosis) -> None:
    margins = [(t.fixable, t.margin) for t in diagnosis.targets if math.isfinite(t.margin)]
    groups = {
        verdict: [margin for own, margin in margins if own == verdict] for verdict in VERDICT_STYLES
    }
    shown = {verdict: values for verdict, values in groups.items() if values}
    if not shown:
        _empty_panel(axes, "Targets", "no margin is known")
        return
    least = min(min(values) for values in shown.values())
    axes.hist(
        list(shown.values()),
        bins=24,
        range=(least, 0) if least < 0 else None,
        stacked=True,
        color=[VERDICT_STYLES[verdict][1] for verdict in shown],
        label=[
            f"{VERDICT_STYLES[verdict][0]} ({len(values):,})" for verdict, values in shown.items()
        ],
        edgecolor="white",
        linewidth=0.5,
    )
    axes.set_ylim(
        top=axes.get_ylim()[1] * (1.05 + 0.08 * len(shown))
    )  # room for the legend above the bars
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _style(
        axes,
        "Targets: can the last layer fix each?",
        "margin: label's logit above the largest other",
        "targets",
    )


def _mixing(axes: Any, mixing: NeighbourMixing | None) -> None:
    if mixing is None:
        _empty_panel(axes, "Neighbourhoods", "not looked at")
        return
    for counts, name, colour, shift in (
        (
            mixing.targets,
            f"targets (mean {rough_percent(mixing.mean('targets'))})",
            figures.ORANGE,
            -0.2,
        ),
        (
            mixing.passed,
            f"passed samples (mean {rough_percent(mixing.mean('passed'))})",
            figures.BLUE,
            0.2,
        ),
    ):
        total = max(1, sum(counts))
        axes.bar(
            [i + shift for i in range(len(counts))],
            [100 * n / total for n in counts],
            0.4,
            color=colour,
            label=name,
        )
    axes.set(xticks=range(mixing.k + 1), ylim=(0, 119), yticks=range(0, 101, 20))
    axes.legend(frameon=False, fontsize=9, loc="upper center")
    across = f"nearest passed samples with its label, of {mixing.k}"
    _style(axes, "Neighbours, by the last layer's inputs", across, "% of samples")


def _room(axes: Any, diagnosis: Diagnosis) -> None:
    from matplotlib.ticker import LogLocator

    best = diagnosis.easiest_layer
    layers = [
        layer for layer in diagnosis.layers if math.isfinite(layer.change) and layer.change > 0
    ]
    shown = sorted(layers, key=lambda layer: layer.change)[:PLOTTED_LAYERS]
    layers = [layer for layer in layers if layer in shown or layer.layer == diagnosis.head]
    if not layers or best is None:
        _empty_panel(axes, LAYERS_TITLE, "no layer can" if diagnosis.layers else "not looked at")
        return
    left = 0.7 * best.change
    for at, layer in enumerate(layers):
        marked = layer == best or layer.layer == diagnosis.head
        colour = figures.GREEN if layer == best else figures.INK if marked else figures.BLUE
        axes.plot(
            [left, layer.change], [at, at], color=figures.LINE_COLOUR, linewidth=1.2, zorder=1
        )
        axes.plot(layer.change, at, "o", color=colour, markersize=7 if marked else 5, zorder=2)
        if marked:
            note = f"{rough_percent(layer.change)}, {'least' if layer == best else 'last layer'}"
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": colour}
            axes.annotate(note, (layer.change, at), (8, 0), **style)
    axes.set_yticks(
        range(len(layers)), [figures.shorten_name(layer.layer, 28) for layer in layers], fontsize=8
    )
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(left, 2.5 * max(layer.change for layer in layers))
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axes.xaxis.set_major_formatter(lambda tick, _: f"{100 * tick:g}%")
    axes.minorticks_off()
    _style(axes, LAYERS_TITLE, "change that fixes a typical target, % of the layer's norm", "")


def _empty_panel(axes: Any, title: str, text: str) -> None:
    axes.text(
        0.5, 0.5, text, ha="center", va="center", color=figures.GREY, transform=axes.transAxes
    )
    axes.set(xticks=[], yticks=[])
    _style(axes, title, "", "")


def _style(axes: Any, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=10, color=figures.INK, loc="left")
    figures.style_axes(axes, across, up, grid="y" if up else "x")
