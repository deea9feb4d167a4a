"""The parts of reports as tables and facts, in words that need no paper beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from lightning_nrl.evaluation.rates import RATES
from lightning_nrl.report._formatting import count, number, percent, plural
from lightning_nrl.report.page import Block, Heading, Row, Table
from lightning_nrl.report.repair_record import RepairRecord
from lightning_nrl.report.run_records import (
    CalibrationBounds,
    Hashes,
    Judge,
    LocalizationReport,
    SearchReport,
    Step,
    StrengthPoint,
    WeightChange,
)
from lightning_nrl.report.splits import (
    ROLES,
    ClassCounts,
    ConfusionCell,
    Flip,
    FlippedSample,
    SetAside,
    SliceReport,
    SplitReport,
    UpdateSplit,
    pool,
    pool_updates,
)
from lightning_nrl.report.stats import percent_up, show_confidence

Fact = tuple[str, str]
Column = TypeVar("Column", SplitReport, UpdateSplit)
LISTED_SAMPLES = 50
"""Failures that were set aside, of which Markdown tells."""
SHOWN_RATES = ("negative_flip_rate", "positive_flip_rate", "negative_flip_impact")
SHOWN_COMPATIBILITIES = ("backward_trust_compatibility", "backward_error_compatibility")

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


def outcome_table(splits: Sequence[SplitReport]) -> Table:
    """What a change of weights did to each split and, where there are several of a role, to all of them."""
    columns = _with_totals(splits, pool)
    in_target: tuple[Row, ...] = ()
    if any(0 < s.passed_in_target < s.passed for s in splits):
        in_target = (
            _row("right samples in the target", columns, lambda s: count(s.passed_in_target)),
            _row("broken of these", columns, lambda s: count(s.broken_in_target), tone="harm", ends_group=True),
        )
    return _table(
        columns,
        _row("samples", columns, lambda s: count(s.n)),
        _row("accuracy before", columns, lambda s: percent(s.accuracy_before)),
        _row("accuracy after", columns, lambda s: percent(s.accuracy_after), ends_group=True),
        _row("failures to repair (the target)", columns, lambda s: count(s.targeted)),
        _row(
            "repaired of these", columns, lambda s: count(s.repaired_in_target), tone="gain", ends_group=not in_target
        ),
        *in_target,
        _row("repaired (was wrong, now right)", columns, lambda s: count(s.repaired)),
        _row("broken (was right, now wrong)", columns, lambda s: count(s.broken), tone="harm"),
        _row("kept (right before and after)", columns, lambda s: count(s.kept)),
        _row("failing (wrong before and after)", columns, lambda s: count(s.failing)),
    )


def unchanged_table(splits: Sequence[SplitReport]) -> Table:
    """The model as it is, for splits under unchanged weights."""
    columns = _with_totals(splits, pool)
    return _table(
        columns,
        _row("samples", columns, lambda s: count(s.n)),
        _row("accuracy", columns, lambda s: percent(s.accuracy_after)),
        _row("right", columns, lambda s: count(s.kept)),
        _row("wrong", columns, lambda s: count(s.failing)),
        _row("failures to repair (the target)", columns, lambda s: count(s.targeted)),
    )


def rates_table(splits: Sequence[SplitReport]) -> Table:
    """The rates that the literature gives for updates."""
    columns = _with_totals(splits, pool)
    rates = [split.rates for split in columns]
    labels = {
        "repair_rate": "repair rate: repaired of the targeted",  # a split's own, in the target
        "break_rate": RATES["break_rate"].label,
        **{name: RATES[name].label for name in (*SHOWN_RATES, *SHOWN_COMPATIBILITIES)},
    }
    rows = [Row(label, tuple(percent(rate[name]) for rate in rates)) for name, label in labels.items()]
    relative = RATES["relative_negative_flip_rate"]
    rows.append(Row(relative.label, tuple(number(rate[relative.name]) for rate in rates)))
    return _table(columns, *rows)


def update_table(splits: Sequence[UpdateSplit]) -> Table:
    """The new model beside the one that it replaces, as training left it and now."""
    columns = _with_totals(splits, pool_updates)

    def rate(split: SplitReport) -> str:
        return percent(RATES["negative_flip_rate"].of(split.counts))

    return _table(
        columns,
        _row("accuracy of the replaced model", columns, lambda s: percent(s.now.accuracy_before)),
        _row("accuracy of the new one", columns, lambda s: percent(s.trained.accuracy_after)),
        _row("accuracy now", columns, lambda s: percent(s.now.accuracy_after), ends_group=True),
        _row("regressions (was right, now wrong) of the new one", columns, lambda s: count(s.trained.broken)),
        _row("regressions now", columns, lambda s: count(s.now.broken), tone="harm"),
        _row("negative flip rate of the new one", columns, lambda s: rate(s.trained)),
        _row("negative flip rate now", columns, lambda s: rate(s.now), ends_group=True),
        _row("improved (was wrong, now right) by the new one", columns, lambda s: count(s.trained.repaired)),
        _row("improved now", columns, lambda s: count(s.now.repaired)),
    )


def slice_table(slices: Sequence[SliceReport]) -> Table:
    """A row a slice; by role how many were targeted, repaired of these, and broken."""
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
            cells += ["-"] * 3 if one is None else map(count, (one.targeted, one.repaired_in_target, one.broken))
            if quotas and role == "known":
                cells.append("-" if one is None or one.quota is None else count(one.quota))
        rows.append(Row(name, tuple(cells)))
    return Table(tuple(columns), tuple(rows))


def steps_table(steps: Sequence[Step]) -> Table:
    """What a method did, step by step."""
    columns = (("repaired", "of the target"), ("broken", "known"), ("seconds", ""), ("", ""))
    rows = [Row(s.name, (count(s.repaired), count(s.broken), f"{s.seconds:,.1f}", s.note)) for s in steps]
    return Table(columns, tuple(rows), notes=True)


def strength_table(path: Sequence[StrengthPoint], chosen: float | None) -> Table:
    """What a patch does at several strengths, the chosen one marked."""
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


def calibration_facts(bounds: CalibrationBounds) -> tuple[Fact, ...]:
    """What the calibration data say of the accepted model."""
    sure = show_confidence(bounds.confidence)
    share = f" ({100 * bounds.broken / bounds.n:.2f} %)" if bounds.n else ""
    limit = f"with {sure} confidence at most {percent_up(bounds.upper)} of such samples"
    if bounds.allowed is not None:
        limit += f" (the limit of {bounds.allowed:,} broken, up to which each strength was accepted, the weakest first)"
    elif bounds.states > 1:
        limit += f" (it holds for each of {bounds.states:,} sets of weights that these data might have chosen)"
    return (("calibration", f"broken {bounds.broken:,} of {bounds.n:,}{share}; {limit}"),)


def set_aside_facts(samples: Sequence[SetAside]) -> tuple[Fact, ...]:
    """Each sample that was set aside and why, the first few."""
    facts = [
        (f"{one.split} {one.id}", f"label {one.label}, the model says {one.prediction}: {one.why}")
        for one in samples[:LISTED_SAMPLES]
    ]
    further = len(samples) - LISTED_SAMPLES
    return (*facts, ("further", f"{further:,}, all in report.json")) if further > 0 else tuple(facts)


def localization_text(localization: LocalizationReport) -> str:
    """How many weights were searched, of how many, and how they were found."""
    sizes = localization.sizes
    text = count(sizes.get("localized", 0))
    if "total" in sizes:
        text += f" of {sizes['total']:,}"
    if localization.requested is not None and localization.requested != sizes.get("localized"):
        text += f", the nearest to the {localization.requested:,} asked for"
    if {"failed", "passed", "both"} <= sizes.keys():
        text += (
            f"; {sizes['failed']:,} matter for the failed data, {sizes['passed']:,} for the passed, "
            f"{sizes['both']:,} for both (the top {localization.n_g:,} by each impact)"
        )
    return text


def search_text(search: SearchReport, seconds: float | None) -> str:
    """How long the search took, on what and with what gain."""
    text = plural(search.iterations, "iteration") + (f" in {seconds:,.1f} s" if seconds is not None else "")
    if search.n_failed is not None and search.n_passed is not None:
        text += f", scored on {search.n_failed:,} failed and {search.n_passed:,} passed samples"
    fitness = f"{number(search.original_fitness)} -> {number(search.fitness)}"
    return f"{text}, fitness {fitness}; stopped: {search.stopped}"


def change_text(change: WeightChange) -> str:
    """How many weights differ and by how much."""
    share = f" ({percent(change.relative)} of the layers' norm)" if math.isfinite(change.relative) else ""
    return (
        f"{change.changed:,} of {change.total:,}, by at most {number(change.largest)}; "
        f"norm of the change {number(change.l2)}{share}"
    )


def rounding_text(judge: Judge) -> str:
    """How many known samples are right by less than rounding."""
    n, rounding = judge.within_rounding, judge.rounding or 0.0
    who = f"{n:,} known samples are" if n != 1 else "1 known sample is"
    return f"{who} right by less than {rounding:.2g}, which another device or batch size may take away"


def hash_facts(hashes: Hashes) -> tuple[Fact, ...]:
    """SHA-256 of the weights before and after; one line where they are the same."""
    facts = []
    for name, before, after in (
        ("layers", hashes.layers_before, hashes.layers_after),
        ("whole model", hashes.model_before, hashes.model_after),
    ):
        if before is not None and before == after:
            facts.append((f"sha256 of the {name}, unchanged", before))
        elif before is not None and after is not None:
            facts += [(f"sha256 of the {name} before", before), (f"sha256 of the {name} after", after)]
    return tuple(facts)


def sample_blocks(report: RepairRecord) -> Iterator[Block]:
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


def flipped_splits(report: RepairRecord) -> tuple[SplitReport, ...]:
    """The splits whose flips matter: of an update against the replaced model, of refused weights what they would do."""
    return tuple(both.now for both in report.update) or report.candidate or report.splits


def most_telling(samples: Sequence[FlippedSample]) -> list[FlippedSample]:
    """All broken samples, the worst margin first, then the repaired ones, the largest gain in margin first."""
    broken = sorted((one for one in samples if one.flip == "broken"), key=lambda one: _or_0(one.margin_after))
    repaired = sorted((one for one in samples if one.flip == "repaired"), key=lambda one: -_gain(one))
    return broken + repaired


def sample_table(samples: Sequence[FlippedSample], name: ClassName) -> Table:
    """One line a sample: what it is, what it was and is taken for, how far it was and is from being wrong."""
    columns = _named("true", "before", "after", "margin before", "margin after", "target")
    with_slices = any(one.slice for one in samples)
    rows = []
    for one in samples:
        cells = [name(one.label), name(one.predicted_before), name(one.predicted_after)]
        cells += [number(one.margin_before), number(one.margin_after), "yes" if one.in_target else ""]
        rows.append(Row(str(one.id), tuple(cells + [one.slice] * with_slices)))
    return Table(columns + _named("slice") * with_slices, tuple(rows))


def class_table(classes: Sequence[ClassCounts], name: ClassName) -> Table:
    """The classes in which a sample flipped, those with the most broken ones first."""
    changed = [one for one in classes if one.counts.broken or one.counts.repaired]
    changed.sort(key=lambda one: (-one.counts.broken, -one.counts.repaired, one.label))
    rows = []
    for one in changed[:LISTED_CLASSES]:
        c = one.counts
        accuracies = percent(c.accuracy_before), percent(c.accuracy_after)
        rows.append(Row(name(one.label), (count(c.n), *accuracies, count(c.repaired), count(c.broken))))
    return Table(_named("samples", "accuracy before", "after", "repaired", "broken"), tuple(rows))


def confusion_changes(cells: Sequence[ConfusionCell]) -> list[ConfusionCell]:
    """The confusions that changed, the largest change first; correct predictions are none."""
    changed = [cell for cell in cells if cell.label != cell.prediction and cell.before != cell.after]
    return sorted(changed, key=lambda cell: (-abs(cell.after - cell.before), cell.label, cell.prediction))


def confusion_table(cells: Sequence[ConfusionCell], name: ClassName) -> Table:
    """The confusions that changed most."""
    rows = []
    for cell in confusion_changes(cells)[:LISTED_CONFUSIONS]:
        counts = count(cell.before), count(cell.after), f"{cell.after - cell.before:+,}"
        rows.append(Row(f"{name(cell.label)} taken for {name(cell.prediction)}", counts))
    return Table(_named("before", "after", "change"), tuple(rows))


def _with_totals(splits: Sequence[Column], total: Callable[[Sequence[Column]], Column]) -> list[Column]:
    """The splits by role, known first, each role of several followed by their sum."""
    columns: list[Column] = []
    for role in ROLES:
        chosen: list[Column] = [split for split in splits if split.role == role]
        columns += chosen
        if len(chosen) > 1:
            columns.append(total(chosen))
    return columns


def _table(columns: Sequence[Column], *rows: Row) -> Table:
    return Table(tuple((split.split, split.role) for split in columns), rows)


def _row(label: str, columns: Sequence[Column], cell: Callable[[Column], str], **style: Any) -> Row:
    return Row(label, tuple(cell(split) for split in columns), **style)


def _named(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "") for name in names)


def _gain(sample: FlippedSample) -> float:
    return _or_0(sample.margin_after - sample.margin_before)


def _or_0(margin: float) -> float:
    return margin if margin == margin else 0.0
