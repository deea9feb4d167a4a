"""A diagnosis as a picture: targets by margin, neighbourhoods, and the layers' room."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_nrl.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from lightning_nrl.diagnosis.diagnosis import Diagnosis, Verdict

__all__ = ["draw_diagnosis"]

BLUE, RED, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#999999"
"""Okabe and Ito's colours, told apart by colour-blind readers too."""
INK, FAINT = "#333333", "#DDDDDD"
VERDICTS: dict[Verdict, tuple[str, str, str]] = {
    "yes": ("fixable alone", BLUE, ""),
    "no": ("not fixable", RED, "///"),
    "undecided": ("undecided", ORANGE, "..."),
    "not tried": ("not looked at", GREY, ""),
}
BINS = 24
MOST_LAYERS = 40


def draw_diagnosis(diagnosis: Diagnosis) -> Any:
    """Margins of the targets by what the last layer can do; agreement with neighbours; the change each layer needs.

    Returns:
        A `matplotlib.figure.Figure`, made without touching the global state of pyplot.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            explain("`plot`: matplotlib is not installed.", "install it: pip install matplotlib")
        ) from error
    layers = min(len(diagnosis.layers), MOST_LAYERS)
    figure = Figure(figsize=(13, max(4.6, 1.6 + 0.2 * layers)), layout="constrained")
    known = diagnosis.known
    figure.suptitle(
        f"Before a repair: {known['targeted']:,} failures to repair, {known['passed']:,} passed samples to keep",
        color=INK,
        fontsize=12,
    )
    margins, mixing, room = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    _margins(margins, diagnosis)
    _mixing(mixing, diagnosis)
    _room(room, diagnosis)
    return figure


def _margins(axes: Any, diagnosis: Diagnosis) -> None:
    groups = {
        verdict: [t.margin for t in diagnosis.targets if t.fixable == verdict and math.isfinite(t.margin)]
        for verdict in VERDICTS
    }
    shown = {verdict: values for verdict, values in groups.items() if values}
    if not shown:
        _nothing(axes, "Targets by margin", "no margin is known")
        return
    least = min(min(values) for values in shown.values())
    names, colours, hatches = zip(*(VERDICTS[verdict] for verdict in shown), strict=True)
    labels = [f"{name} ({len(values):,})" for name, values in zip(names, shown.values(), strict=True)]
    _, _, stacks = axes.hist(
        list(shown.values()),
        bins=BINS,
        range=(least, 0) if least < 0 else None,
        stacked=True,
        color=colours,
        label=labels,
        edgecolor="white",
        linewidth=0.5,
    )
    for stack, hatch in zip(stacks if len(shown) > 1 else [stacks], hatches, strict=True):
        for bar in stack:
            bar.set_hatch(hatch)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _dress(
        axes, "Targets by margin, and what the last layer can do", "margin of the label's logit (0: right)", "targets"
    )


def _mixing(axes: Any, diagnosis: Diagnosis) -> None:
    mixing = diagnosis.mixing
    if mixing is None:
        _nothing(axes, "Neighbourhoods", "not looked at")
        return
    places = range(mixing.k + 1)
    for counts, name, colour, shift in (
        (mixing.targets, f"targets (mean {mixing.mean('targets'):.0%})", RED, -0.2),
        (mixing.passed, f"passed samples (mean {mixing.mean('passed'):.0%})", BLUE, 0.2),
    ):
        total = max(1, sum(counts))
        axes.bar([i + shift for i in places], [100 * n / total for n in counts], 0.4, color=colour, label=name)
    axes.set_xticks(list(places))
    axes.legend(frameon=False, fontsize=9, loc="upper center")
    _dress(
        axes,
        "Neighbourhoods before the last layer",
        f"of the {mixing.k} nearest passed samples, those with its own label",
        "% of samples",
    )


def _room(axes: Any, diagnosis: Diagnosis) -> None:
    layers = [layer for layer in diagnosis.layers if math.isfinite(layer.change)][-MOST_LAYERS:]
    if not layers:
        _nothing(axes, "Room by layer", "not looked at")
        return
    best = diagnosis.roomiest
    colours = [GREEN if layer == best else INK if layer.layer == diagnosis.head else BLUE for layer in layers]
    places = range(len(layers))
    axes.barh(list(places), [100 * layer.change for layer in layers], color=colours, height=0.72)
    axes.set_yticks(list(places), [layer.layer for layer in layers], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    for at, layer in zip(places, layers, strict=True):
        if layer == best or layer.layer == diagnosis.head:
            note = f"{100 * layer.change:.2g} %" + (", roomiest" if layer == best else ", last")
            axes.annotate(note, (100 * layer.change, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.margins(x=0.25)
    _dress(axes, "Room by layer: shorter is roomier", "change that repairs a target, median, % of the layer's norm", "")


def _nothing(axes: Any, title: str, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])
    _dress(axes, title, "", "")


def _dress(axes: Any, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(across, fontsize=9, color=INK)
    axes.set_ylabel(up, fontsize=9, color=INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis="x" if not up else "y", color=FAINT, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
