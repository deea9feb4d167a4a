"""Numbers of a report for loggers, by tag.

Numbers that are not finite are omitted, since several loggers refuse them or draw them wrongly.
"""

from __future__ import annotations

import math

from lightning_nrl._trainer.tracking.tags import (
    DATA_TAG,
    FURTHER_TAG,
    LOCALIZATION_TAG,
    NUMBER_TAG,
    PART_TAG,
    ROLE_NUMBER,
    RUNG_TAG,
    SEARCH_TAG,
    SLICE_TAG,
    STRENGTH_TAG,
    tagged,
)
from lightning_nrl.evaluation import FlipCounts
from lightning_nrl.evaluation.rates import UPDATE_RATES
from lightning_nrl.evaluation.slices import slice_tags
from lightning_nrl.records import Rung, SplitReport, pool
from lightning_nrl.release import ReleaseReport
from lightning_nrl.report import RepairReport
from lightning_nrl.updates.interpolation import InterpolationChoice

Scalars = dict[str, float]
"""Values by tag."""

SEARCH_CURVES = {
    "best": "best_fitness",
    "mean": "mean_fitness",
    "patched": "repaired",
    "loss_failed": "loss_failed",
    "loss_passed": "loss_passed",
    "diversity": "diversity",
    "broken": "broken",  # should be 0
}
"""Names of logged numbers by the name of their curve in `SearchReport.curves`."""
EVIDENCE_VALUES = {"better": 1.0, "no difference shown": 0.0, "worse": -1.0}


def outcome(report: RepairReport, name: str) -> Scalars:
    """Returns the main numbers of a repair, the most important first.

    There are at most twelve, or more in a model update. Numbers `known_...` and `unseen_...` count
    all known or all unseen splits, with the weights that the model has now. In a model update,
    `..._regressions` and `..._nfr` compare with the replaced model. Numbers `refused_...` count
    what refused weights would repair and break.
    """
    numbers: Scalars = {"accepted": float(report.status == "repaired")}
    if report.verdict.source != "none":
        numbers["evidence"] = EVIDENCE_VALUES[report.verdict.evidence]
    for role in ("known", "unseen"):
        split, update = report.pooled(role), report.pooled_update(role)
        if split is not None:
            numbers |= tagged(ROLE_NUMBER, _headline(split), role=role)
        if update is not None:
            regressions: Scalars = {
                "regressions_before": update.trained.broken,
                "regressions": update.final.broken,
                "nfr": update.final.rates["negative_flip_rate"],
            }
            numbers |= tagged(ROLE_NUMBER, regressions, role=role)
    if report.candidate:
        numbers |= _flips("refused", pool(report.candidate).counts)
    return _finite(tagged(NUMBER_TAG, numbers, name=name))


def _headline(split: SplitReport) -> Scalars:
    numbers: Scalars = {"broken": split.broken}
    if split.role != "known":
        numbers["repaired"] = split.repaired
    elif split.targeted:
        numbers["repaired_in_target"] = split.repaired_in_target
    numbers["repair_rate"] = split.rates["repair_rate"]
    if split.role != "known":
        numbers["nfr"] = split.rates["negative_flip_rate"]
    numbers["accuracy"] = split.accuracy_after
    return numbers


def _flips(role: str, counts: FlipCounts) -> Scalars:
    flips: Scalars = {"repaired": counts.repaired, "broken": counts.broken}
    return tagged(ROLE_NUMBER, flips, role=role)


def update_numbers(counts: FlipCounts) -> Scalars:
    """Returns numbers of a model compared with the replaced model. Undefined rates are NaN."""
    return {
        **{rate.short: rate.of(counts) for rate in UPDATE_RATES},
        "broken": counts.broken,
        "repaired": counts.repaired,
        "accuracy": counts.accuracy_after,
        "reference_accuracy": counts.accuracy_before,
    }


def interpolation_numbers(choice: InterpolationChoice) -> Scalars:
    """Returns the chosen strength; accuracy and NFR for it and for strength 1 (`_before`)."""
    before, after = choice.curve[0], choice.chosen
    return {
        "strength": choice.strength,
        "accuracy_before": before.accuracy,
        "accuracy": after.accuracy,
        "nfr_before": before.negative_flip_rate,
        "nfr": after.negative_flip_rate,
    }


def release_numbers(report: ReleaseReport, name: str) -> Scalars:
    """Returns `accepted` (1 or 0), and the numbers of each split and of each slice in it."""
    numbers = tagged(NUMBER_TAG, {"accepted": float(report.accepted)}, name=name)
    tags = slice_tags({row.slice for row in report.rows if row.slice})
    for row in report.rows:
        part = f"{row.split}/{tags[row.slice]}" if row.slice else row.split
        of_row = update_numbers(row.counts) | {"nfr_upper": row.upper}
        numbers |= tagged(PART_TAG, of_row, name=name, part=part)
    return _finite(numbers)


def further_numbers(report: RepairReport, name: str) -> Scalars:
    """Returns the numbers of splits, slices, rungs and weights, which `outcome` does not return."""
    numbers: Scalars = {}
    for split in report.splits:
        numbers |= tagged(DATA_TAG, split.numbers, name=name, split=split.split)
    tags = slice_tags({part.name for part in report.slices})
    for part in report.slices:
        counts: Scalars = {
            "targeted": part.targeted,
            "repaired_in_target": part.repaired_in_target,
            "repaired": part.repaired,
            "broken": part.broken,
        }
        by_role = tagged(ROLE_NUMBER, counts, role=part.role)
        numbers |= tagged(SLICE_TAG, by_role, name=name, slice=tags[part.name])
    for rung in report.rungs:
        numbers |= tagged(RUNG_TAG, _rung_numbers(rung), name=name, rung=rung.name)
    if report.localization is not None:
        sizes = {"n_g": report.localization.n_g, **report.localization.sizes}
        numbers |= tagged(LOCALIZATION_TAG, sizes, name=name)
    of_repair = {"seconds": sum(report.seconds.values()), "passes": sum(report.passes.values())}
    if report.change is not None:
        of_repair["weights_changed"] = report.change.changed
    return _finite(numbers | tagged(FURTHER_TAG, of_repair, name=name))


def _rung_numbers(rung: Rung) -> Scalars:
    numbers: Scalars = {
        "repaired_in_target": rung.repaired_in_target,
        "repaired": rung.repaired,
        "broken": rung.broken,
        "weights_changed": rung.weights_changed,
        "seconds": rung.seconds,
    }
    if rung.held_out is not None:
        numbers |= _flips("held_out", rung.held_out)
    return numbers


def final_numbers(report: RepairReport, name: str = "repair") -> Scalars:
    """Returns all numbers except the curves: those of `outcome` and of `further_numbers`."""
    return outcome(report, name) | further_numbers(report, name)


def search_curves(report: RepairReport, name: str = "repair") -> list[Scalars]:
    """Returns the numbers of each iteration of the search; an empty list without a search."""
    points: list[Scalars] = []
    if report.search is None:
        return points
    curves = report.search.curves
    for curve, number in SEARCH_CURVES.items():
        for iteration, value in enumerate(curves.get(curve, ())):
            if iteration == len(points):
                points.append({})
            points[iteration][number] = value
    return [_finite(tagged(SEARCH_TAG, point, name=name)) for point in points]


def strength_curves(report: RepairReport, name: str = "repair") -> dict[int, Scalars]:
    """Returns counts by strength, the applied share of the weight change, in percent.

    Counts at 0 % are 0.
    """
    curves: dict[int, Scalars] = {}
    for point in report.strength:
        numbers: Scalars = {"repaired_in_target": point.repaired_in_target}
        for role, counts in (("known", point.known), ("calibration", point.calibration)):
            if counts is not None:
                numbers |= _flips(role, counts)
        at = round(100 * point.strength)
        curves[at] = _finite(tagged(STRENGTH_TAG, numbers, name=name))
        curves.setdefault(0, dict.fromkeys(curves[at], 0.0))
    return dict(sorted(curves.items()))


def _finite(scalars: Scalars) -> Scalars:
    return {tag: float(value) for tag, value in scalars.items() if math.isfinite(value)}
