"""The plot of a diagnosis: targets by margin, neighbourhoods, and the layers' room."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_nrl.report._figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LINE_COLOUR,
    ORANGE,
    RED,
    dress,
    new_figure,
    shorten_name,
)
from lightning_nrl.report._formatting import rough_percent

if TYPE_CHECKING:
    from lightning_nrl.analysis.diagnosis.diagnosis_result import Diagnosis, Fixable

__all__ = ["draw_diagnosis"]

VERDICT_STYLES: dict[Fixable, tuple[str, str, str]] = {
    "yes": ("can be fixed", BLUE, ""),
    "no": ("cannot be fixed", RED, "///"),
    "undecided": ("undecided", ORANGE, "..."),
    "not tried": ("not tried", GREY, ""),
}
MARGIN_BINS = 24
PLOTTED_LAYERS = 40
LAYER_NAME_LENGTH = 28  # characters of a layer's name
LAYERS_TITLE = "Room: the layer that must change least"


def draw_diagnosis(diagnosis: Diagnosis) -> Any:
    """Margins of the targets by what the last layer can do; agreement with neighbours; the change each layer needs."""
    layers = min(len(diagnosis.layers), PLOTTED_LAYERS)
    figure = new_figure(13, max(4.6, 1.6 + 0.2 * layers))
    title = "Before a repair: {targeted:,} failures to repair, {passed:,} passed samples to keep"
    figure.suptitle(title.format(**diagnosis.known), color=INK, fontsize=12)
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    for draw, axes in zip((_margins, _mixing, _room), panels, strict=True):
        draw(axes, diagnosis)
    return figure


def _margins(axes: Any, diagnosis: Diagnosis) -> None:
    groups = {
        verdict: [t.margin for t in diagnosis.targets if t.fixable == verdict and math.isfinite(t.margin)]
        for verdict in VERDICT_STYLES
    }
    shown = {verdict: values for verdict, values in groups.items() if values}
    if not shown:
        _nothing(axes, "Targets", "no margin is known")
        return
    least = min(min(values) for values in shown.values())
    names, colours, hatches = zip(*(VERDICT_STYLES[verdict] for verdict in shown), strict=True)
    labels = [f"{name} ({len(values):,})" for name, values in zip(names, shown.values(), strict=True)]
    _, _, stacks = axes.hist(
        list(shown.values()),
        bins=MARGIN_BINS,
        range=(least, 0) if least < 0 else None,
        stacked=True,
        color=list(colours),  # two in a tuple are a colour and its opacity for matplotlib 3.8
        label=labels,
        edgecolor="white",
        linewidth=0.5,
    )
    for stack, hatch in zip(stacks if len(shown) > 1 else [stacks], hatches, strict=True):
        for bar in stack:
            bar.set_hatch(hatch)
    axes.set_ylim(top=axes.get_ylim()[1] * (1.05 + 0.08 * len(shown)))  # room for the legend above the bars
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _dress(axes, "Targets: can the last layer fix each?", "margin: label's logit above the largest other", "targets")


def _mixing(axes: Any, diagnosis: Diagnosis) -> None:
    mixing = diagnosis.mixing
    if mixing is None:
        _nothing(axes, "Neighbourhoods", "not looked at")
        return
    places = range(mixing.k + 1)
    for counts, name, colour, shift in (
        (mixing.targets, f"targets (mean {rough_percent(mixing.mean('targets'))})", ORANGE, -0.2),
        (mixing.passed, f"passed samples (mean {rough_percent(mixing.mean('passed'))})", BLUE, 0.2),
    ):
        total = max(1, sum(counts))
        axes.bar([i + shift for i in places], [100 * n / total for n in counts], 0.4, color=colour, label=name)
    axes.set(xticks=list(places), ylim=(0, 119), yticks=range(0, 101, 20))
    axes.legend(frameon=False, fontsize=9, loc="upper center")
    across = f"of the {mixing.k} nearest passed samples, with its label"
    _dress(axes, "Neighbours, by the last layer's inputs", across, "% of samples")


def _room(axes: Any, diagnosis: Diagnosis) -> None:
    """A dot a layer on a logarithmic axis, which has no 0 for bars to begin at."""
    from matplotlib.ticker import LogLocator

    best = diagnosis.easiest_layer
    layers = [layer for layer in diagnosis.layers if math.isfinite(layer.change) and layer.change > 0]
    shown = set(sorted(layers, key=lambda layer: layer.change)[:PLOTTED_LAYERS])
    layers = [layer for layer in layers if layer in shown or layer.layer == diagnosis.head]
    if not layers or best is None:
        _nothing(axes, LAYERS_TITLE, "no layer can" if diagnosis.layers else "not looked at")
        return
    places = range(len(layers))
    left = 0.7 * best.change
    for at, layer in zip(places, layers, strict=True):
        marked = layer == best or layer.layer == diagnosis.head
        colour = GREEN if layer == best else INK if marked else BLUE
        axes.plot([left, layer.change], [at, at], color=LINE_COLOUR, linewidth=1.2, zorder=1)
        axes.plot(layer.change, at, "o", color=colour, markersize=7 if marked else 5, zorder=2)
        if marked:
            note = f"{rough_percent(layer.change)}, {'least' if layer == best else 'last layer'}"
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": colour}
            axes.annotate(note, (layer.change, at), (8, 0), **style)
    axes.set_yticks(list(places), [shorten_name(layer.layer, LAYER_NAME_LENGTH) for layer in layers], fontsize=8)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(left, 2.5 * max(layer.change for layer in layers))
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    axes.xaxis.set_major_formatter(lambda tick, _: f"{100 * tick:g}%")
    axes.minorticks_off()
    _dress(axes, LAYERS_TITLE, "change that fixes a typical target, % of the layer's norm", "")


def _nothing(axes: Any, title: str, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])
    _dress(axes, title, "", "")


def _dress(axes: Any, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    dress(axes, across, up, grid="y" if up else "x")
