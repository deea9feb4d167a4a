"""Flipped samples, classes, confusions and margins as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from lightning_nrl.report._formatting import count, number, percent
from lightning_nrl.report.page import Block, Heading, Row, Table
from lightning_nrl.report.repair_report import RepairReport
from lightning_nrl.report.sample_records import ClassCounts, ConfusionCell, Flip, FlippedSample
from lightning_nrl.report.splits import ROLES, SplitReport, pool

__all__ = [
    "FLIPPED_COLUMNS",
    "class_table",
    "confusion_changes",
    "confusion_table",
    "flipped_splits",
    "most_telling",
    "sample_blocks",
    "sample_table",
]

ClassName = Callable[[int], str]

LISTED_FLIPS: Mapping[Flip, int] = {"broken": 50, "repaired": 10}
LISTED_CLASSES, LISTED_CONFUSIONS = 20, 20
FLIPPED_COLUMNS = (
    "split",
    "position",
    "flip",
    "true",
    "before",
    "after",
    "margin before",
    "margin after",
    "in target",
    "slice",
)
"""Of a table of all flipped samples, as pages and loggers have it."""


def sample_blocks(report: RepairReport) -> Iterator[Block]:
    """By role the classes and confusions that changed, then the samples; of an update against the replaced model."""
    splits = flipped_splits(report)
    for role in ROLES:
        own = [split for split in splits if split.role == role]
        if own and any(split.broken or split.repaired for split in own):
            together = pool(own)
            if together.classes:
                yield Heading(f"Classes in which samples flipped, {role} data")
                yield class_table(together.classes, report.class_name)
            if confusion_changes(together.confusion):
                yield Heading(f"Confusions that changed, {role} data")
                yield confusion_table(together.confusion, report.class_name)
    for split in splits:
        for flip, most in LISTED_FLIPS.items():
            samples = [one for one in most_telling(split.flipped) if one.flip == flip]
            if samples:
                listed = f", {most} of {len(samples):,}" if len(samples) > most else ""
                yield Heading(f"{flip.capitalize()} in {split.split}, by position in the data set{listed}")
                yield sample_table(samples[:most], report.class_name)


def flipped_splits(report: RepairReport) -> tuple[SplitReport, ...]:
    """The splits whose flips matter: of an update against the replaced model, of refused weights what they would do."""
    return tuple(both.now for both in report.update) or report.candidate or report.splits


def most_telling(samples: Sequence[FlippedSample]) -> list[FlippedSample]:
    """All broken samples, the worst margin first, then the repaired ones, the largest gain in margin first."""
    broken = sorted((one for one in samples if one.flip == "broken"), key=lambda one: _or_0(one.margin_after))
    repaired = sorted((one for one in samples if one.flip == "repaired"), key=lambda one: -_gain(one))
    return broken + repaired


def sample_table(samples: Sequence[FlippedSample], name: ClassName) -> Table:
    """One line a sample: what it is, what it was and is taken for, how far it was and is from being wrong."""
    columns = (("true", ""), ("before", ""), ("after", ""), ("margin before", ""), ("margin after", ""), ("target", ""))
    with_slices = any(one.slice for one in samples)
    rows = []
    for one in samples:
        cells = [name(one.label), name(one.predicted_before), name(one.predicted_after)]
        cells += [number(one.margin_before), number(one.margin_after), "yes" if one.in_target else ""]
        rows.append(Row(str(one.id), tuple(cells + [one.slice] * with_slices)))
    return Table((*columns, *((("slice", ""),) * with_slices)), tuple(rows))


def class_table(classes: Sequence[ClassCounts], name: ClassName) -> Table:
    """The classes in which a sample flipped, those with the most broken ones first."""
    changed = [one for one in classes if one.counts.broken or one.counts.repaired]
    changed.sort(key=lambda one: (-one.counts.broken, -one.counts.repaired, one.label))
    columns = ("samples", "accuracy before", "after", "repaired", "broken")
    rows = [
        Row(
            name(one.label),
            (
                count(one.counts.n),
                percent(one.counts.accuracy_before),
                percent(one.counts.accuracy_after),
                count(one.counts.repaired),
                count(one.counts.broken),
            ),
        )
        for one in changed[:LISTED_CLASSES]
    ]
    return Table(tuple((column, "") for column in columns), tuple(rows))


def confusion_changes(cells: Sequence[ConfusionCell]) -> list[ConfusionCell]:
    """The confusions that changed, the largest change first; correct predictions are none."""
    changed = [cell for cell in cells if cell.label != cell.prediction and cell.before != cell.after]
    return sorted(changed, key=lambda cell: (-abs(cell.after - cell.before), cell.label, cell.prediction))


def confusion_table(cells: Sequence[ConfusionCell], name: ClassName) -> Table:
    """The confusions that changed most."""
    rows = [
        Row(
            f"{name(cell.label)} taken for {name(cell.prediction)}",
            (count(cell.before), count(cell.after), f"{cell.after - cell.before:+,}"),
        )
        for cell in confusion_changes(cells)[:LISTED_CONFUSIONS]
    ]
    return Table((("before", ""), ("after", ""), ("change", "")), tuple(rows))


def _gain(sample: FlippedSample) -> float:
    return _or_0(sample.margin_after - sample.margin_before)


def _or_0(margin: float) -> float:
    return margin if margin == margin else 0.0
