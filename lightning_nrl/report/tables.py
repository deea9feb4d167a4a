"""Tables for the pages of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning_nrl._utils.formatting import count, number, percent
from lightning_nrl.evaluation.rates import RATES
from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.records.repair_record import RepairRecord, StrengthPoint
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
        ("repaired of these", "repaired_in_target", "gain", not in_target),
    ]
    if in_target:
        rows += [
            ("right samples in the target", "passed_in_target"),
            ("broken of these", "broken_in_target", "harm", True),
        ]
    rows += [
        ("repaired (was wrong, now right)", "repaired"),
        ("broken (was right, now wrong)", "broken", "harm"),
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
        ("regressions now", "now.broken", "harm"),
        ("improved (was wrong, now right) by the new one", "trained.repaired"),
        ("improved now", "now.repaired", "", True),
        ("negative flip rate of the new one", "trained.negative_flip_rate"),
        ("negative flip rate now", "now.negative_flip_rate"),
    ]
    return _table(_with_totals(splits, pool_updates), rows)


def slice_table(slices: Sequence[SliceReport]) -> Table:
    """Tabulates targeted, repaired and broken samples. Each slice has a row, and each role has
    columns.
    """
    roles = [role for role in ROLES if any(s.role == role for s in slices)]
    quotas = any(s.quota is not None for s in slices)
    columns: list[tuple[str, str]] = []
    for role in roles:
        columns += [(name, role) for name in ("targeted", "repaired", "broken")]
        columns += [("quota", role)] if quotas and role == "known" else []
    rows = []
    for name in dict.fromkeys(s.name for s in slices):
        by_role: dict[str, SliceReport] = {s.role: s for s in slices if s.name == name}
        cells: list[str] = []
        for role in roles:
            one = by_role.get(role)
            cells += (
                ["-"] * 3
                if one is None
                else map(count, (one.targeted, one.repaired_in_target, one.broken))
            )
            if quotas and role == "known":
                cells.append("-" if one is None or one.quota is None else count(one.quota))
        rows.append(Row(name, tuple(cells)))
    return Table(tuple(columns), tuple(rows))


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
    calibrated = any(point.calibration is not None for point in path)
    columns += [("repaired", "calibration"), ("broken", "calibration")] if calibrated else []
    rows = []
    for point in path:
        cells = [point.repaired_in_target, point.known.repaired, point.known.broken]
        if point.calibration is not None:
            cells += [point.calibration.repaired, point.calibration.broken]
        taken = point.strength == chosen
        label = f"strength {point.strength:g}" + ", polished" * point.polished + ", taken" * taken
        rows.append(Row(label, tuple(map(count, cells)), "gain" if taken else ""))
    return Table(tuple(columns), tuple(rows))


def rungs_table(rungs: Sequence[Rung]) -> Table:
    """Tabulates the rungs of the default method, one per column, and marks the rung that was taken."""
    repaired, broken, points = zip(*(_held_out(rung.held_out) for rung in rungs), strict=True)
    rows = (
        Row("targets repaired", tuple(count(rung.repaired_in_target) for rung in rungs), "gain"),
        Row("known samples repaired", tuple(count(rung.repaired) for rung in rungs)),
        Row(
            "known samples broken",
            tuple(count(rung.broken) for rung in rungs),
            "harm",
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
    """Tabulates the best results by the share of known samples that may break. Skips repeated
    results.
    """
    known = ("targets", "repaired"), ("known", "repaired"), ("known", "broken")
    columns = (*known, ("held out", "repaired"), ("held out", "broken"), ("held out", "points"))
    rows, last = [], None
    for point in price:
        counts = point.repaired_in_target, point.repaired, point.broken
        if counts != last:
            allowed = (
                f"{percent(point.allowed)} may break" if point.allowed < 1 else "any may break"
            )
            label = allowed if point.allowed else "none may break"
            rows.append(Row(label, (*map(count, counts), *_held_out(point.held_out))))
        last = counts
    return Table(columns, tuple(rows))


def _held_out(counts: TargetCounts | None) -> tuple[str, str, str]:
    if counts is None:
        return "-", "-", "-"
    failed = counts.repaired + counts.failing
    shares = (
        f"{count(counts.repaired)} of {count(failed)}",
        f"{count(counts.broken)} of {count(counts.passed)}",
    )
    return *shares, f"{points_of(counts):+.1f}"


def points_of(counts: FlipCounts) -> float:
    """Computes the change of accuracy in percentage points."""
    return 100 * (counts.accuracy_after - counts.accuracy_before)


def sample_blocks(report: RepairRecord) -> Iterator[Block]:
    """Yields tables of the classes and confusions that changed, by role, and of the flipped
    samples, by split.
    """
    splits = flipped_splits(report)
    for role, own in by_role(splits).items():
        together = pool(own)
        if together.broken or together.repaired:
            if together.classes:
                yield Heading(f"Classes in which samples flipped, {role} data")
                yield _class_table(together.classes, report.class_name)
            if confusion_changes(together.confusion):
                yield Heading(f"Confusions that changed, {role} data")
                yield _confusion_table(together.confusion, report.class_name)
    for split in splits:
        for flip, most in LISTED_FLIPS.items():
            samples = [one for one in most_telling(split.flipped) if one.flip == flip]
            if samples:
                listed = f", {most} of {len(samples):,}" if len(samples) > most else ""
                yield Heading(
                    f"{flip.capitalize()} in {split.split}, by position in the data set{listed}"
                )
                yield _sample_table(samples[:most], report.class_name)


def flipped_splits(report: RepairRecord) -> tuple[SplitReport, ...]:
    """Returns the splits whose flips are shown: the first of `update`, `candidate` and `splits`
    that is not empty.
    """
    return tuple(both.now for both in report.update) or report.candidate or report.splits


def flipped_rows(report: RepairRecord) -> list[list[Any]]:
    """Returns a row of values for each flipped sample, in the order of `FLIPPED_COLUMNS`. Numbers
    stay numbers.
    """
    rows: list[list[Any]] = []
    for split in flipped_splits(report):
        for one in split.flipped:
            classes = map(report.class_name, (one.label, one.predicted_before, one.predicted_after))
            margins = one.margin_before, one.margin_after
            rows.append(
                [split.split, one.id, one.flip, *classes, *margins, one.in_target, one.slice]
            )
    return rows


def most_telling(samples: Sequence[FlippedSample]) -> list[FlippedSample]:
    """Sorts broken samples by rising margin after the repair, then repaired samples by falling gain
    in margin.
    """

    def key(one: FlippedSample) -> tuple[bool, float]:
        margin = one.margin_after if one.flip == "broken" else one.margin_before - one.margin_after
        return one.flip == "repaired", 0.0 if math.isnan(margin) else margin

    return sorted(samples, key=key)


def _sample_table(samples: Sequence[FlippedSample], name: ClassName) -> Table:
    columns = _named("true", "before", "after", *MARGINS, "in target")
    with_slices = any(one.slice for one in samples)
    rows = []
    for one in samples:
        cells = [name(one.label), name(one.predicted_before), name(one.predicted_after)]
        cells += [
            number(one.margin_before),
            number(one.margin_after),
            "yes" if one.in_target else "",
        ]
        rows.append(Row(str(one.id), tuple(cells + [one.slice] * with_slices)))
    return Table(columns + _named("slice") * with_slices, tuple(rows))


def _class_table(classes: Sequence[ClassCounts], name: ClassName) -> Table:
    changed = [one for one in classes if one.counts.broken or one.counts.repaired]
    changed.sort(key=lambda one: (-one.counts.broken, -one.counts.repaired, one.label))
    rows = []
    for one in changed[:LISTED_CLASSES]:
        c = one.counts
        accuracies = percent(c.accuracy_before), percent(c.accuracy_after)
        rows.append(
            Row(name(one.label), (count(c.n), *accuracies, count(c.repaired), count(c.broken)))
        )
    return Table(_named("samples", "accuracy before", "after", "repaired", "broken"), tuple(rows))


def confusion_changes(cells: Sequence[ConfusionCell]) -> list[ConfusionCell]:
    """Returns the cells of wrong predictions whose number changed, the largest change first."""
    changed = [
        cell for cell in cells if cell.label != cell.prediction and cell.before != cell.after
    ]
    return sorted(
        changed, key=lambda cell: (-abs(cell.after - cell.before), cell.label, cell.prediction)
    )


def _confusion_table(cells: Sequence[ConfusionCell], name: ClassName) -> Table:
    rows = []
    for cell in confusion_changes(cells)[:LISTED_CONFUSIONS]:
        counts = count(cell.before), count(cell.after), f"{cell.after - cell.before:+,}"
        rows.append(Row(f"{name(cell.label)} taken for {name(cell.prediction)}", counts))
    return Table(_named("before", "after", "change"), tuple(rows))


def _with_totals(
    splits: Sequence[AnySplit], total: Callable[[Sequence[AnySplit]], AnySplit]
) -> list[AnySplit]:
    """Sorts splits by role, known first, and adds a total for each role that has several splits."""
    columns: list[AnySplit] = []
    for chosen in by_role(splits).values():
        columns += chosen
        columns += [total(chosen)] if len(chosen) > 1 else []
    return columns


def _table(columns: Sequence[AnySplit], rows: Iterable[tuple[Any, ...]]) -> Table:
    """Builds a table with a column per split. Each of `rows` has a label, a key of `numbers`, and
    options of `Row`.

    In an update, `trained.` or `now.` precedes the key.
    """
    heads = tuple((split.split, split.role) for split in columns)
    return Table(
        heads,
        tuple(
            Row(label, tuple(_cell(s, name) for s in columns), *rest) for label, name, *rest in rows
        ),
    )


def _cell(split: SplitReport | UpdateSplit, name: str) -> str:
    when, _, name = name.rpartition(".")
    counted: Any = getattr(split, when) if when else split
    value = counted.numbers[name]
    return count(value) if isinstance(value, int) else percent(value)


def _named(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "") for name in names)
