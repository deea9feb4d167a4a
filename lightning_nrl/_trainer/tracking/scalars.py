"""Numbers of a report for loggers, by tag.

Loggers group tags by the part before the first slash: `<name>/` has the few numbers for a decision,
`<name>_numbers/` all other numbers, `<name>_search/` and `<name>_strength/` the curves. Numbers
that are not finite are omitted, since several loggers refuse them or draw them wrongly.
"""

from __future__ import annotations

import math

from lightning_nrl.evaluation.rates import UPDATE_RATES
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.evaluation.slices import slice_tags
from lightning_nrl.records import SplitReport
from lightning_nrl.report import RepairReport
from lightning_nrl.updates import ReleaseReport

Scalars = dict[str, float]
"""Values by tag."""

SEARCH_CURVES = {
    "best": "best_fitness",
    "mean": "mean_fitness",
    "patched": "repaired",
    "loss_failed": "loss_failed",
    "loss_passed": "loss_passed",
    "diversity": "diversity",
}
"""Tags of the curves in `SearchHistory`, by name. Its curve `intact` is logged as `broken`, which
should be 0.
"""
EVIDENCE_VALUES = {"better": 1.0, "no difference shown": 0.0, "worse": -1.0}


def outcome(report: RepairReport, name: str = "repair") -> Scalars:
    """Returns the main numbers of a repair, the most important first: at most twelve, or more in a
    model update.

    Numbers `known_...` and `unseen_...` count all known or all unseen splits, with the weights that
    the model has now. In a model update, `..._regressions` and `..._nfr` compare with the replaced
    model. Numbers `refused_...` count what refused weights would repair and break.
    """
    found: Scalars = {"accepted": float(report.status == "repaired")}
    if report.verdict.source != "none":
        found["evidence"] = EVIDENCE_VALUES[report.verdict.evidence]
    for role in ("known", "unseen"):
        split, update = report.pooled(role), report.pooled_update(role)
        if split is not None:
            found |= {f"{role}_{number}": value for number, value in _headline(split).items()}
        if update is not None:
            found[f"{role}_regressions_before"] = update.trained.broken
            found[f"{role}_regressions"] = update.now.broken
            found[f"{role}_nfr"] = update.now.rates["negative_flip_rate"]
    if report.candidate:
        found["refused_repaired"] = sum(split.repaired for split in report.candidate)
        found["refused_broken"] = sum(split.broken for split in report.candidate)
    return _finite(found, f"{name}/")


def _headline(split: SplitReport) -> Scalars:
    rates = split.rates
    found: Scalars = {"broken": split.broken}
    if split.role != "known":
        found |= {"repaired": split.repaired, "repair_rate": rates["repair_rate"]}
        return {**found, "nfr": rates["negative_flip_rate"], "accuracy": split.accuracy_after}
    if split.targeted:
        found["repaired_in_target"] = split.repaired_in_target
    return {**found, "repair_rate": rates["repair_rate"], "accuracy": split.accuracy_after}


def update_numbers(counts: FlipCounts) -> Scalars:
    """Returns rates, counts and accuracies of a model compared with the replaced model. Undefined
    rates are NaN.
    """
    numbers = {rate.short: rate.of(counts) for rate in UPDATE_RATES}
    numbers |= {"broken": counts.broken, "repaired": counts.repaired}
    return numbers | {
        "accuracy": counts.accuracy_after,
        "reference_accuracy": counts.accuracy_before,
    }


def release_numbers(report: ReleaseReport, name: str = "release") -> Scalars:
    """Returns `accepted` (1 or 0), and the numbers of each split (`<name>/<split>/...`) and of each
    slice in it.
    """
    found: Scalars = {"accepted": float(report.accepted)}
    tags = slice_tags({row.slice for row in report.rows if row.slice})
    for row in report.rows:
        place = f"{row.split}/{tags[row.slice]}" if row.slice else row.split
        numbers = update_numbers(row.counts) | {"nfr_upper": row.upper}
        found |= {f"{place}/{key}": value for key, value in numbers.items()}
    return _finite(found, f"{name}/")


def further_numbers(report: RepairReport, name: str = "repair") -> Scalars:
    """Returns numbers of splits, slices, rungs of the default method, and weights, which `outcome`
    does not return.
    """
    found: Scalars = {}
    for split in report.splits:
        found |= {f"{split.split}_data/{number}": value for number, value in split.numbers.items()}
    tags = slice_tags({one.name for one in report.slices})
    for one in report.slices:
        for number in ("targeted", "repaired_in_target", "repaired", "broken"):
            found[f"slice_{tags[one.name]}/{one.role}_{number}"] = getattr(one, number)
    for rung in report.rungs:
        for number in ("repaired_in_target", "repaired", "broken", "weights_changed", "seconds"):
            found[f"rung_{rung.name}/{number}"] = getattr(rung, number)
        if rung.held_out is not None:
            found[f"rung_{rung.name}/held_out_repaired"] = rung.held_out.repaired
            found[f"rung_{rung.name}/held_out_broken"] = rung.held_out.broken
    if report.localization is not None:
        sizes = {"n_g": report.localization.n_g, **report.localization.sizes}
        found |= {f"localization/{key}": value for key, value in sizes.items()}
    if report.change is not None:
        found["weights_changed"] = report.change.changed
    found["seconds"] = sum(report.seconds.values())
    return _finite(found, f"{name}_numbers/")


def final_numbers(report: RepairReport, name: str = "repair") -> Scalars:
    """Returns the numbers of `outcome` and of `further_numbers`, which are all numbers except the
    curves.
    """
    return outcome(report, name) | further_numbers(report, name)


def search_curves(report: RepairReport, name: str = "repair") -> list[Scalars]:
    """Returns the numbers of each iteration of the search. The list is empty if there was no
    search.
    """
    search = report.search
    if search is None:
        return []
    curves = {
        tag: search.history[curve]
        for curve, tag in SEARCH_CURVES.items()
        if curve in search.history
    }
    if search.n_passed is not None and "intact" in search.history:
        curves["broken"] = [search.n_passed - intact for intact in search.history["intact"]]
    length = max((len(curve) for curve in curves.values()), default=0)
    points = [
        {tag: curve[i] for tag, curve in curves.items() if i < len(curve)} for i in range(length)
    ]
    return [_finite(point, f"{name}_search/") for point in points]


def strength_curves(report: RepairReport, name: str = "repair") -> dict[int, Scalars]:
    """Returns counts by strength, the share of the weight change that is applied, in percent.
    Counts at 0 % are 0.
    """
    found: dict[int, Scalars] = {}
    for point in report.strength:
        counts: Scalars = {"repaired_in_target": point.repaired_in_target}
        for role, flips in (("known", point.known), ("calibration", point.calibration)):
            if flips is not None:
                counts |= {f"{role}_repaired": flips.repaired, f"{role}_broken": flips.broken}
        found[round(100 * point.strength)] = _finite(counts, f"{name}_strength/")
        found.setdefault(0, dict.fromkeys(found[round(100 * point.strength)], 0.0))
    return dict(sorted(found.items()))


def _finite(scalars: Scalars, prefix: str) -> Scalars:
    return {
        f"{prefix}{tag}": float(value) for tag, value in scalars.items() if math.isfinite(value)
    }
