"""A diagnosis as a page of tables and facts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_nrl.diagnosis.diagnosis import Diagnosis, Verdict
from lightning_nrl.report.page import Block, Facts, Heading, Page, Row, Table, Text

REST: tuple[Verdict, ...] = ("undecided", "not tried")

__all__ = ["page", "part", "seconds"]

FEW = 8
"""Samples and layers that are shown; the JSON has all."""


def page(diagnosis: Diagnosis, everything: bool = False) -> Page:
    """The advice, then what it rests on.

    Args:
        diagnosis: what was found.
        everything: whether all samples and layers are shown, not the first few.
    """
    few = 10**9 if everything else FEW
    blocks: list[Block] = [Heading("Before a repair", 1), Text(diagnosis.advice), Facts(_facts(diagnosis))]
    if any(target.fixable != "not tried" for target in diagnosis.targets):
        blocks += [Heading("Each target alone, by the last layer, at zero known regressions"), _alone(diagnosis)]
    if diagnosis.binding:
        blocks += [Heading("Passed samples that stand in the way"), _binding(diagnosis, few)]
    if diagnosis.doubts:
        blocks += [Heading("Labels to look at"), _doubts(diagnosis, few)]
    if diagnosis.layers:
        blocks += [Heading("Room by layer"), _layers(diagnosis, few)]
    if diagnosis.costs:
        blocks += [Heading("What a repair would take"), Facts(_costs(diagnosis))]
    if diagnosis.notes:
        blocks += [Heading("Not looked at"), *(Text(note) for note in diagnosis.notes)]
    return Page(tuple(blocks))


def part(share: float) -> str:
    """A share as a percentage; `-` where it is not known."""
    if not math.isfinite(share):
        return "-" if math.isnan(share) else "none"
    digits = 0 if share >= 0.1 or not share else 1 if share >= 0.01 else 2
    return f"{share:.{digits}%}"


def seconds(time: float) -> str:
    """A time in words that do not claim more than is known."""
    if time < 1:
        return "under 1 s"
    if time < 100:
        return f"{time:.0f} s"
    return f"{time / 60:.0f} min" if time < 7200 else f"{time / 3600:.1f} h"


def _facts(diagnosis: Diagnosis) -> tuple[tuple[str, str], ...]:
    known = diagnosis.known
    facts = [
        ("target", diagnosis.target),
        (
            "known samples",
            f"{known['samples']:,}: {known['passed']:,} passed, {known['failed']:,} failed, "
            f"{known['targeted']:,} of these to be repaired",
        ),
    ]
    mixing, check = diagnosis.mixing, diagnosis.check
    if mixing is not None:
        facts.append(
            (
                "neighbourhoods",
                f"of {mixing.k} nearest passed samples, {part(mixing.mean('targets'))} have a target's own label and "
                f"{part(mixing.mean('passed'))} a passed sample's",
            )
        )
    if check is not None:
        facts.append(
            (
                "held out",
                f"a repair of one target by the last layer repairs {check.repaired:.1f} of {check.others:,} others and "
                f"breaks {check.broken:.1f} of {check.passed:,} passed samples that it was not told of; "
                f"{part(check.harmless)} break none",
            )
        )
    return tuple(facts)


def _alone(diagnosis: Diagnosis) -> Table:
    classes = sorted({target.label for target in diagnosis.targets})
    groups = [(str(label), [t for t in diagnosis.targets if t.label == label]) for label in classes]
    if len(classes) == 1 or classes == [-1]:
        groups = []
    groups.append(("all", list(diagnosis.targets)))

    def counts(verdict: Verdict) -> tuple[str, ...]:
        return tuple(f"{sum(t.fixable == verdict for t in group):,}" for _, group in groups)

    rows = [
        Row("targets", tuple(f"{len(group):,}" for _, group in groups)),
        Row("fixable alone", counts("yes"), "gain"),
        Row("not fixable", counts("no")),
        *(Row(verdict, counts(verdict)) for verdict in REST if diagnosis.count(verdict)),
        Row("change of the logits, median", tuple(part(_median([t.change for t in group])) for _, group in groups)),
        Row("neighbours that agree, mean", tuple(part(_mean([t.agreement for t in group])) for _, group in groups)),
    ]
    return Table(tuple((name, "class" if name != "all" else "") for name, _ in groups), tuple(rows))


def _binding(diagnosis: Diagnosis, few: int) -> Table:
    shown = diagnosis.binding[:few]
    rows = [Row(f"{b.split} {b.id}", (str(b.label), f"{b.margin:.2g}", f"{b.targets:,}")) for b in shown]
    rest = len(diagnosis.binding) - len(shown)
    if rest:
        rows.append(Row(f"and {rest:,} more", ("", "", f"<= {diagnosis.binding[few].targets:,}")))
    return Table((("class", ""), ("margin", ""), ("targets", "bound")), tuple(rows))


def _doubts(diagnosis: Diagnosis, few: int) -> Table:
    shown = diagnosis.doubts[:few]
    rows = [Row(f"{d.split} {d.id}", (str(d.label), str(d.prediction), part(d.agreed), f"{d.lead:.1f}")) for d in shown]
    if len(diagnosis.doubts) > len(shown):
        rows.append(Row(f"and {len(diagnosis.doubts) - len(shown):,} more", ("", "", "", "")))
    return Table((("label", "given"), ("looks like", ""), ("neighbours", "agree"), ("lead", "logits")), tuple(rows))


def _layers(diagnosis: Diagnosis, few: int) -> Table:
    layers = list(diagnosis.layers)
    best = sorted(layers, key=lambda layer: layer.change)[:few]
    head = [layer for layer in layers if layer.layer == diagnosis.head]
    shown = [layer for layer in layers if layer in best or layer in head]
    rows = [
        Row(
            layer.layer,
            (layer.kind, f"{layer.weights:,}", part(layer.room), part(layer.change)),
            "gain" if layer == diagnosis.roomiest else "",
        )
        for layer in shown
    ]
    if len(layers) > len(shown):
        rows.append(Row(f"and {len(layers) - len(shown):,} with less", ("", "", "", "")))
    return Table((("kind", ""), ("weights", ""), ("room", ""), ("change", "needed")), tuple(rows))


def _costs(diagnosis: Diagnosis) -> tuple[tuple[str, str], ...]:
    return tuple((cost.method, f"about {seconds(cost.seconds)}: {cost.how}") for cost in diagnosis.costs)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _median(values: Sequence[float]) -> float:
    known = sorted(value for value in values if not math.isnan(value))
    return known[len(known) // 2] if known else math.nan
