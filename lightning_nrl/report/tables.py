"""Tables for the pages of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning_nrl._utils.formatting import count, number, percent
from lightning_nrl.evaluation.rates import RATES
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.records.repair_record import RepairRecord, StrengthPoint
from lightning_nrl.records.splits import (
    ROLES,
    AnySplit,
    ClassCounts,
    ConfusionCell,
    Flip,
    FlippedSample,
    Role,
    SliceReport,
    SplitReport,
    UpdateSplit,
    by_role,
    pool,
    pool_updates,
)
from lightning_nrl.records.steps import PricePoint, Rung, Step
from lightning_nrl.report.page import Block, Heading, Row, Table

Fact = tuple[str, str]
SHOWN_RATES = (
    "negative_flip_rate",
    "positive_flip_rate",
    "negative_flip_impact",
    "backward_trust_compatibility",
    "backward_error_compatibility",
)

ClassName = Callable[[int], str]

LISTED_FLIPS: Mapping[Flip, int] = {"broken": 50, "repaired": 10}
LISTED_CLASSES, LISTED_CONFUSIONS = 20, 20
MARGINS = ("margin before", "margin after")
FLIPPED_COLUMNS = (
    "split",
    "position",
    "flip",
    "true",
    "before",
    "after",
    *MARGINS,
    "in target",
    "slice",
)
"""Columns of the table of all flipped samples on pages and in loggers."""


def outcome_table(splits: Sequence[SplitReport]) -> Table:
    """Tabulates counts by split, with a total for each role that has several splits."""
    in_target = any(0 < s.passed_in_target < s.passed for s in splits)
    rows = [
        ("samples", "n"),
        ("accuracy before", "accuracy_before"),
        ("accuracy after", "accuracy_after", "", True),
        ("failures to repair (the target)", "targeted"),
        ("repaired of these", "repaired_in_target", "good", not in_target),
    ]
    if in_target:
        rows += [
            ("right samples in the target", "passed_in_target"),
            ("broken of these", "broken_in_target", "bad", True),
        ]
    rows += [
        ("repaired (was wrong, now right)", "repaired"),
        ("broken (was right, now wrong)", "broken", "bad"),
        ("kept (right before and after)", "kept"),
        ("failing (wrong before and after)", "failing"),
    ]
    return _table(_with_totals(splits, pool), rows)


def unchanged_table(splits: Sequence[SplitReport]) -> Table:
    """Tabulates accuracy and counts of splits under unchanged weights."""
    rows = [
        ("samples", "n"),
        ("accuracy", "accuracy_after"),
        ("right", "kept"),
        ("wrong", "failing"),
        ("failures to repair (the target)", "targeted"),
    ]
    return _table(_with_totals(splits, pool), rows)


def rates_table(splits: Sequence[SplitReport]) -> Table:
    """Tabulates the repair rate, the break rate and published rates for model updates, by split."""
    columns = _with_totals(splits, pool)
    named = [(RATES[name].label, name) for name in ("break_rate", *SHOWN_RATES)]
    table = _table(columns, [("repair rate: repaired of the targeted", "repair_rate"), *named])
    relative = RATES["relative_negative_flip_rate"]
    last = Row(relative.label, tuple(number(split.rates[relative.name]) for split in columns))
    return Table(table.columns, (*table.rows, last))


def update_table(splits: Sequence[UpdateSplit]) -> Table:
    """Tabulates the new model, before and after the repair, against the replaced model."""
    rows = [
        ("accuracy of the replaced model", "now.accuracy_before"),
        ("accuracy of the new one", "trained.accuracy_after"),
        ("accuracy now", "now.accuracy_after", "", True),
        ("regressions (was right, now wrong) of the new one", "trained.broken"),
        ("regressions now", "now.broken", "bad"),
        ("improved (was wrong, now right) by the new one", "trained.repaired"),
        ("improved now", "now.repaired", "", True),
        ("negative flip rate of the new one", "trained.negative_flip_rate"),
        ("negative flip rate now", "now.negative_flip_rate"),
    ]
    return _table(_with_totals(splits, pool_updates), rows)


def slice_table(slices: Sequence[SliceReport]) -> Table:
    """Tabulates targeted, repaired and broken samples: a row per slice, columns per role."""
    reports = {(report.name, report.role): report for report in slices}
    with_quotas = any(report.quota is not None for report in slices)
    columns: list[tuple[str, Role]] = []
    for role in sorted({report.role for report in slices}, key=ROLES.index):
        columns += [("targeted", role), ("repaired", role), ("broken", role)]
        if with_quotas and role == "known":
            columns.append(("quota", role))
    rows = []
    for name in dict.fromkeys(report.name for report in slices):
        cells = [_slice_cell(reports.get((name, role)), column) for column, role in columns]
        rows.append(Row(name, tuple(cells)))
    return Table(tuple(columns), tuple(rows))


def _slice_cell(report: SliceReport | None, column: str) -> str:
    if report is None:
        return "-"
    counts = {
        "targeted": report.targeted,
        "repaired": report.repaired_in_target,
        "broken": report.broken,
        "quota": report.quota,
    }
    n = counts[column]
    return "-" if n is None else count(n)


def steps_table(steps: Sequence[Step]) -> Table:
    """Tabulates the steps of a method."""
    columns = (("repaired", "of the target"), ("broken", "known"), ("seconds", ""), ("", ""))
    rows = [
        Row(s.name, (count(s.repaired), count(s.broken), f"{s.seconds:,.1f}", s.note))
        for s in steps
    ]
    return Table(columns, tuple(rows), notes=True)


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
        taken = point.strength == chosen
        label = f"strength {point.strength:g}"
        if point.polished:
            label += ", polished"
        if taken:
            label += ", taken"
        rows.append(Row(label, tuple(map(count, cells)), "good" if taken else ""))
    return Table(tuple(columns), tuple(rows))


def rungs_table(rungs: Sequence[Rung]) -> Table:
    """Tabulates the rungs of the default method, one per column, and marks the taken rung."""
    repaired, broken, points = zip(*(_held_out(rung.held_out) for rung in rungs), strict=True)
    rows = (
        Row("targets repaired", tuple(count(rung.repaired_in_target) for rung in rungs), "good"),
        Row("known samples repaired", tuple(count(rung.repaired) for rung in rungs)),
        Row(
            "known samples broken",
            tuple(count(rung.broken) for rung in rungs),
            "bad",
            ends_group=True,
        ),
        Row("held-out failures repaired", repaired),
        Row("held-out passed samples broken", broken),
        Row("held-out accuracy, points", points, ends_group=True),
        Row("weights changed", tuple(count(rung.weights_changed) for rung in rungs)),
        Row("seconds", tuple(f"{rung.seconds:,.1f}" for rung in rungs)),
    )
    return Table(tuple((rung.name, "taken" * rung.taken) for rung in rungs), rows)


def price_table(price: Sequence[PricePoint]) -> Table:
    """Tabulates the best results by the share of known samples that may break."""
    known = ("targets", "repaired"), ("known", "repaired"), ("known", "broken")
    columns = (*known, ("held out", "repaired"), ("held out", "broken"), ("held out", "points"))
    rows, previous = [], None
    for point in price:
        counts = point.repaired_in_target, point.repaired, point.broken
        if counts != previous:
            cells = (*map(count, counts), *_held_out(point.held_out))
            rows.append(Row(_allowance(point.allowed), cells))
        previous = counts
    return Table(columns, tuple(rows))


def _allowance(share: float) -> str:
    if not share:
        return "none may break"
    if share < 1:
        return f"{percent(share)} may break"
    return "any may break"


def _held_out(counts: TargetCounts | None) -> tuple[str, str, str]:
    if counts is None:
        return "-", "-", "-"
    failed = counts.repaired + counts.failing
    shares = (
        f"{count(counts.repaired)} of {count(failed)}",
        f"{count(counts.broken)} of {count(counts.passed)}",
    )
    return *shares, f"{counts.points:+.1f}"


def sample_blocks(report: RepairRecord) -> Iterator[Block]:
    """Yields tables of changed classes and confusions by role, and of flipped samples by split."""
    splits = flipped_splits(report)
    for role, role_splits in by_role(splits).items():
        pooled = pool(role_splits)
        if not pooled.broken and not pooled.repaired:
            continue
        if pooled.classes:
            yield Heading(f"Classes in which samples flipped, {role} data")
            yield _class_table(pooled.classes, report.class_name)
        if confusion_changes(pooled.confusion):
            yield Heading(f"Confusions that changed, {role} data")
            yield _confusion_table(pooled.confusion, report.class_name)
    for split in splits:
        for flip, most in LISTED_FLIPS.items():
            samples = [sample for sample in most_telling(split.flipped) if sample.flip == flip]
            if samples:
                title = f"{flip.capitalize()} in {split.split}, by position in the data set"
                if len(samples) > most:
                    title += f", {most} of {len(samples):,}"
                yield Heading(title)
                yield _sample_table(samples[:most], report.class_name)


def flipped_splits(report: RepairRecord) -> tuple[SplitReport, ...]:
    """Returns the splits whose flips are shown: of an update, of refused weights or the repair."""
    if report.update:
        return tuple(split.now for split in report.update)
    return report.candidate or report.splits


def flipped_rows(report: RepairRecord) -> list[list[str | float]]:
    """Returns a row for each flipped sample, as in `FLIPPED_COLUMNS`. Numbers stay numbers."""
    rows: list[list[str | float]] = []
    for split in flipped_splits(report):
        for sample in split.flipped:
            classes = _class_names(sample, report.class_name)
            margins = sample.margin_before, sample.margin_after
            where = sample.in_target, sample.slice
            rows.append([split.split, sample.id, sample.flip, *classes, *margins, *where])
    return rows


def _class_names(sample: FlippedSample, class_name: ClassName) -> list[str]:
    labels = (sample.label, sample.predicted_before, sample.predicted_after)
    return list(map(class_name, labels))


def most_telling(samples: Sequence[FlippedSample]) -> list[FlippedSample]:
    """Sorts broken samples by rising margin, then repaired samples by falling gain in margin."""

    def key(sample: FlippedSample) -> tuple[bool, float]:
        margin = sample.margin_after
        if sample.flip == "repaired":
            margin = sample.margin_before - sample.margin_after
        return sample.flip == "repaired", 0.0 if math.isnan(margin) else margin

    return sorted(samples, key=key)


def _sample_table(samples: Sequence[FlippedSample], class_name: ClassName) -> Table:
    columns = ["true", "before", "after", *MARGINS, "in target"]
    with_slices = any(sample.slice for sample in samples)
    if with_slices:
        columns.append("slice")
    rows = []
    for sample in samples:
        cells = [
            *_class_names(sample, class_name),
            number(sample.margin_before),
            number(sample.margin_after),
            "yes" if sample.in_target else "",
        ]
        if with_slices:
            cells.append(sample.slice)
        rows.append(Row(str(sample.id), tuple(cells)))
    return Table(_named(*columns), tuple(rows))


def _class_table(classes: Sequence[ClassCounts], class_name: ClassName) -> Table:
    flipped = [row for row in classes if row.counts.broken or row.counts.repaired]
    flipped.sort(key=lambda row: (-row.counts.broken, -row.counts.repaired, row.label))
    rows = []
    for class_counts in flipped[:LISTED_CLASSES]:
        counts = class_counts.counts
        cells = (
            count(counts.n),
            percent(counts.accuracy_before),
            percent(counts.accuracy_after),
            count(counts.repaired),
            count(counts.broken),
        )
        rows.append(Row(class_name(class_counts.label), cells))
    return Table(_named("samples", "accuracy before", "after", "repaired", "broken"), tuple(rows))


def confusion_changes(cells: Sequence[ConfusionCell]) -> list[ConfusionCell]:
    """Returns the cells of wrong predictions whose number changed, the largest change first."""
    errors = [cell for cell in cells if cell.label != cell.prediction]
    changed = [cell for cell in errors if cell.before != cell.after]
    return sorted(
        changed, key=lambda cell: (-abs(cell.after - cell.before), cell.label, cell.prediction)
    )


def _confusion_table(cells: Sequence[ConfusionCell], class_name: ClassName) -> Table:
    rows = []
    for cell in confusion_changes(cells)[:LISTED_CONFUSIONS]:
        counts = count(cell.before), count(cell.after), f"{cell.after - cell.before:+,}"
        label, prediction = class_name(cell.label), class_name(cell.prediction)
        rows.append(Row(f"{label} taken for {prediction}", counts))
    return Table(_named("before", "after", "change"), tuple(rows))


def _with_totals(
    splits: Sequence[AnySplit], total: Callable[[Sequence[AnySplit]], AnySplit]
) -> list[AnySplit]:
    """Sorts splits by role, known first, and adds a total for each role that has several splits."""
    columns: list[AnySplit] = []
    for role_splits in by_role(splits).values():
        columns += role_splits
        if len(role_splits) > 1:
            columns.append(total(role_splits))
    return columns


def _table(columns: Sequence[AnySplit], rows: Iterable[tuple[Any, ...]]) -> Table:
    """Builds a table with a column per split.

    Each of `rows` has a label, a key of `numbers`, and options of `Row`. In an update, `trained.`
    or `now.` precedes the key.
    """
    heads = tuple((split.split, split.role) for split in columns)
    lines = []
    for label, key, *options in rows:
        cells = tuple(_cell(split, key) for split in columns)
        lines.append(Row(label, cells, *options))
    return Table(heads, tuple(lines))


def _cell(split: SplitReport | UpdateSplit, key: str) -> str:
    if isinstance(split, UpdateSplit):
        part, _, key = key.partition(".")
        split = split.trained if part == "trained" else split.now
    value = split.numbers[key]
    return count(value) if isinstance(value, int) else percent(value)


def _named(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "") for name in names)
