"""Tables for the pages of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning_nrl._utils.formatting import number, percent, titled
from lightning_nrl.evaluation.rates import RATES
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.records import CautionPoint, PricePoint, RepairRecord, Rung, Step, StrengthPoint
from lightning_nrl.records.splits import (
    ROLES,
    AnySplit,
    ClassCounts,
    ConfusionCell,
    Flip,
    FlippedSample,
    SliceReport,
    SplitReport,
    UpdateSplit,
    by_role,
    pool,
    pool_by_role,
    pool_updates,
)
from lightning_nrl.report.page import Block, Heading, Row, Table, Tone

Fact = tuple[str, str]
RELATIVE_RATE = "relative_negative_flip_rate"  # no share, so not in percent
SHOWN_RATES = (
    "break_rate",
    "negative_flip_rate",
    "positive_flip_rate",
    "negative_flip_impact",
    "backward_trust_compatibility",
    "backward_error_compatibility",
    RELATIVE_RATE,
)

ClassName = Callable[[int], str]

LISTED_FLIPS: Mapping[Flip, int] = {"broken": 50, "repaired": 10}
RUNG_TONES: Mapping[str, Tone] = {"targets repaired": "good", "known samples broken": "bad"}
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
    "name",
)
"""Columns of the table of all flipped samples on pages and in loggers."""


def outcome_table(splits: Sequence[SplitReport]) -> Table:
    """Tabulates counts by split, with a total for each role that has several splits."""
    in_target = any(0 < split.passed_in_target < split.passed for split in splits)
    rows = [
        ("samples", "n"),
        ("accuracy before", "accuracy_before"),
        ("accuracy after", "accuracy_after", "", True),
        ("failures to repair (the target)", "targeted"),
        ("repaired of these", "repaired_in_target", "good", not in_target),
        ("right samples in the target", "passed_in_target"),
        ("broken of these", "broken_in_target", "bad", True),
        ("repaired (was wrong, now right)", "repaired"),
        ("broken (was right, now wrong)", "broken", "bad"),
        ("kept (right before and after)", "kept"),
        ("failing (wrong before and after)", "failing"),
    ]
    if not in_target:
        del rows[5:7]
    return _table(splits, rows, pool)


def unchanged_table(splits: Sequence[SplitReport]) -> Table:
    """Tabulates accuracy and counts of splits under unchanged weights."""
    rows = [
        ("samples", "n"),
        ("accuracy", "accuracy_after"),
        ("right", "kept"),
        ("wrong", "failing"),
        ("failures to repair (the target)", "targeted"),
    ]
    return _table(splits, rows, pool)


def rates_table(splits: Sequence[SplitReport]) -> Table:
    """Tabulates the repair rate, the break rate and published rates for model updates, by split."""
    rates = [(RATES[name].label, name) for name in SHOWN_RATES]
    rows = [("repair rate: repaired of the targeted", "repair_rate"), *rates]
    return _table(splits, rows, pool)


def update_table(splits: Sequence[UpdateSplit]) -> Table:
    """Tabulates the new model, before and after the repair, against the replaced model."""
    rows = [
        ("accuracy of the replaced model", "final.accuracy_before"),
        ("accuracy of the new one", "trained.accuracy_after"),
        ("accuracy now", "final.accuracy_after", "", True),
        ("regressions (was right, now wrong) of the new one", "trained.broken"),
        ("regressions now", "final.broken", "bad"),
        ("improved (was wrong, now right) by the new one", "trained.repaired"),
        ("improved now", "final.repaired", "", True),
        ("negative flip rate of the new one", "trained.negative_flip_rate"),
        ("negative flip rate now", "final.negative_flip_rate"),
    ]
    return _table(splits, rows, pool_updates)


def slice_table(slices: Sequence[SliceReport]) -> Table:
    """Tabulates targeted, repaired and broken samples: a row per slice, columns per role."""
    columns: dict[tuple[str, str], None] = {}
    table: dict[str, dict[tuple[str, str], str]] = {}
    for report in sorted(slices, key=lambda report: ROLES.index(report.role)):
        counts = {
            "targeted": report.targeted,
            "repaired": report.repaired_in_target,
            "broken": report.broken,
        }
        if report.quota is not None:
            counts["quota"] = report.quota
        row = table.setdefault(report.name, {})
        for column, n in counts.items():
            columns[column, report.role] = None
            row[column, report.role] = f"{n:,}"
    rows = []
    for name, row in table.items():
        rows.append(Row(name, [row.get(column, "-") for column in columns]))
    return Table(list(columns), rows)


def steps_table(steps: Sequence[Step]) -> Table:
    """Tabulates the steps of a method."""
    columns = (("repaired", "of the target"), ("broken", "known"), ("seconds", ""), ("", ""))
    rows = []
    for step in steps:
        cells = f"{step.repaired:,}", f"{step.broken:,}", f"{step.seconds:,.1f}", step.note
        rows.append(Row(step.name, cells))
    return Table(columns, rows, notes=True)


def stages_table(seconds: Mapping[str, float], passes: Mapping[str, float]) -> Table:
    """Tabulates the time of each stage, and its forward passes over the known data."""
    rows = []
    for stage in {**seconds, **passes}:
        cells = f"{seconds.get(stage, 0.0):,.2f}", f"{passes.get(stage, 0.0):,.1f}"
        rows.append(Row(stage, cells))
    return Table((("seconds", ""), ("passes", "")), rows)


def strength_table(path: Sequence[StrengthPoint], chosen: float | None) -> Table:
    """Tabulates counts by strength and marks the chosen strength."""
    columns = [("repaired", "of the target"), ("repaired", "known"), ("broken", "known")]
    if any(point.calibration is not None for point in path):
        columns += [("repaired", "calibration"), ("broken", "calibration")]
    rows = []
    for point in path:
        cells = [point.repaired_in_target, point.known.repaired, point.known.broken]
        if point.calibration is not None:
            cells += [point.calibration.repaired, point.calibration.broken]
        label = f"strength {point.strength:g}"
        if point.polished:
            label += ", polished"
        tone: Tone = ""
        if point.strength == chosen:
            label += ", taken"
            tone = "good"
        rows.append(Row(label, [f"{cell:,}" for cell in cells], tone))
    return Table(columns, rows)


def rungs_table(rungs: Sequence[Rung]) -> Table:
    """Tabulates the rungs of the default method, one per column, and says which are kept."""
    columns, cells = [], []
    for rung in rungs:
        columns.append((rung.name, "kept" if rung.kept else "not kept"))
        cells.append(_rung_cells(rung))
    rows = []
    for label in cells[0]:
        ends_group = label in ("known samples broken", "held-out accuracy, points")
        rows.append(
            Row(label, [column[label] for column in cells], RUNG_TONES.get(label, ""), ends_group)
        )
    return Table(columns, rows)


def _rung_cells(rung: Rung) -> dict[str, str]:
    repaired, broken, points = _held_out(rung.held_out)
    return {
        "targets repaired": f"{rung.repaired_in_target:,}",
        "known samples repaired": f"{rung.repaired:,}",
        "known samples broken": f"{rung.broken:,}",
        "held-out failures repaired": repaired,
        "held-out passed samples broken": broken,
        "held-out accuracy, points": points,
        "weights changed": f"{rung.weights_changed:,}",
        "seconds": f"{rung.seconds:,.1f}",
    }


def price_table(price: Sequence[PricePoint]) -> Table:
    """Tabulates the best results by the share of known samples that may break."""
    known = ("targets", "repaired"), ("known", "repaired"), ("known", "broken")
    columns = (*known, ("held out", "repaired"), ("held out", "broken"), ("held out", "points"))
    rows, previous = [], None
    for point in price:
        counts = point.repaired_in_target, point.repaired, point.broken
        if counts != previous:
            cells = [*map("{:,}".format, counts), *_held_out(point.held_out)]
            rows.append(Row(_allowance(point.allowed), cells))
        previous = counts
    return Table(columns, rows)


def caution_table(points: Sequence[CautionPoint]) -> Table:
    """Tabulates held-out counts by caution and marks the one that was chosen."""
    columns = ("held out", "repaired"), ("held out", "broken"), ("held out", "points")
    rows = []
    for point in points:
        label = f"caution {point.caution:g}"
        tone: Tone = ""
        if point.chosen:
            label += ", chosen"
            tone = "good"
        rows.append(Row(label, _held_out(point.held_out), tone))
    return Table(columns, rows)


def _allowance(share: float) -> str:
    if not share:
        return "none may break"
    if share < 1:
        return f"{percent(share)} may break"
    return "any may break"


def _held_out(counts: TargetCounts | None) -> tuple[str, str, str]:
    if counts is None:
        return "-", "-", "-"
    return (
        f"{counts.repaired:,} of {counts.repaired + counts.failing:,}",
        f"{counts.broken:,} of {counts.passed:,}",
        f"{counts.points:+.1f}",
    )


def sample_blocks(report: RepairRecord) -> Iterator[Block]:
    """Yields tables of changed classes and confusions by role, and of flipped samples by split."""
    splits = flipped_splits(report)
    for role, pooled in pool_by_role(splits).items():
        if not pooled.broken and not pooled.repaired:
            continue
        if pooled.classes:
            yield Heading(f"Classes in which samples flipped, {role} data")
            yield _class_table(pooled.classes, report.class_name)
        if confusion_changes(pooled.confusion):
            yield Heading(f"Confusions that changed, {role} data")
            yield _confusion_table(pooled.confusion, report.class_name)
    for flip, most in LISTED_FLIPS.items():
        for split in splits:
            samples = most_telling(split.flipped_as(flip))
            if samples:
                title = f"{flip.capitalize()} in {split.split}, by position in the data set"
                if len(samples) > most:
                    title += f", {most} of {len(samples):,}"
                yield Heading(title)
                yield _sample_table(samples[:most], report.class_name)


def flipped_splits(report: RepairRecord) -> Sequence[SplitReport]:
    """Returns the splits whose flips are shown: of an update, of refused weights or the repair.

    Known data come last.
    """
    splits: Sequence[SplitReport] = report.candidate or report.splits
    if report.update:
        splits = [split.final for split in report.update]
    return sorted(splits, key=lambda split: split.role == "known")


def flipped_rows(report: RepairRecord) -> list[list[str | float]]:
    """Returns a row for each flipped sample, as in `FLIPPED_COLUMNS`. Numbers stay numbers."""
    rows: list[list[str | float]] = []
    for split in flipped_splits(report):
        for sample in split.flipped:
            rows.append(
                [
                    split.split,
                    sample.id,
                    sample.flip,
                    *_class_names(sample, report.class_name),
                    sample.margin_before,
                    sample.margin_after,
                    sample.in_target,
                    sample.slice,
                    sample.name,
                ]
            )
    return rows


def _class_names(sample: FlippedSample, class_name: ClassName) -> Iterable[str]:
    return map(class_name, (sample.label, sample.predicted_before, sample.predicted_after))


def most_telling(samples: Sequence[FlippedSample]) -> list[FlippedSample]:
    """Sorts broken samples by rising margin, then repaired samples by falling gain in margin."""
    return sorted(samples, key=_flip_order)


def _flip_order(sample: FlippedSample) -> tuple[bool, float]:
    is_repaired = sample.flip == "repaired"
    margin = sample.margin_after
    if is_repaired:
        margin = sample.margin_before - sample.margin_after
    return is_repaired, 0.0 if math.isnan(margin) else margin


def _sample_table(samples: Sequence[FlippedSample], class_name: ClassName) -> Table:
    columns = _named(*FLIPPED_COLUMNS[3:-1])  # the name is beside the position
    if not any(sample.slice for sample in samples):
        columns.pop()
    rows = []
    for sample in samples:
        cells = [
            *_class_names(sample, class_name),
            number(sample.margin_before),
            number(sample.margin_after),
            "yes" if sample.in_target else "",
            sample.slice,
        ]
        rows.append(Row(titled(sample.id, sample.name), cells[: len(columns)]))
    return Table(columns, rows)


def _class_table(classes: Sequence[ClassCounts], class_name: ClassName) -> Table:
    rows = []
    for row in sorted(classes, key=lambda row: (-row.counts.broken, -row.counts.repaired)):
        counts = row.counts
        if counts.broken or counts.repaired:
            cells = (
                f"{counts.n:,}",
                percent(counts.accuracy_before),
                percent(counts.accuracy_after),
                f"{counts.repaired:,}",
                f"{counts.broken:,}",
            )
            rows.append(Row(class_name(row.label), cells))
    return Table(
        _named("samples", "accuracy before", "after", "repaired", "broken"), rows[:LISTED_CLASSES]
    )


def confusion_changes(cells: Sequence[ConfusionCell]) -> list[ConfusionCell]:
    """Returns the cells of wrong predictions whose number changed, the largest change first."""
    changed = [cell for cell in cells if cell.label != cell.prediction and cell.change]
    return sorted(changed, key=lambda cell: -abs(cell.change))


def confusion_title(cell: ConfusionCell, class_name: ClassName) -> str:
    """Returns the classes of a cell as text, such as `cat taken for dog`."""
    return f"{class_name(cell.label)} taken for {class_name(cell.prediction)}"


def _confusion_table(cells: Sequence[ConfusionCell], class_name: ClassName) -> Table:
    rows = []
    for cell in confusion_changes(cells)[:LISTED_CONFUSIONS]:
        counts = f"{cell.before:,}", f"{cell.after:,}", f"{cell.change:+,}"
        rows.append(Row(confusion_title(cell, class_name), counts))
    return Table(_named("before", "after", "change"), rows)


def _table(
    splits: Sequence[AnySplit],
    rows: Iterable[tuple[Any, ...]],
    total: Callable[[Sequence[AnySplit]], AnySplit],
) -> Table:
    """Builds a table with a column per split, known first, and a total of each role with several.

    Each of `rows` has a label, a key of `numbers`, and options of `Row`. In an update, `trained.`
    or `final.` precedes the key.
    """
    columns = []
    for role_splits in by_role(splits).values():
        columns += role_splits
        if len(role_splits) > 1:
            columns.append(total(role_splits))
    heads = [(split.split, split.role) for split in columns]
    lines = []
    for label, key, *options in rows:
        lines.append(Row(label, [_cell(split, key) for split in columns], *options))
    return Table(heads, lines)


def _cell(split: SplitReport | UpdateSplit, key: str) -> str:
    if isinstance(split, UpdateSplit):
        part, _, key = key.partition(".")
        split = {"trained": split.trained, "final": split.final}[part]
    value = split.numbers[key]
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if key == RELATIVE_RATE else percent(value)


def _named(*names: str) -> list[tuple[str, str]]:
    return [(name, "") for name in names]
