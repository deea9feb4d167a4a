"""A report as numbers for loggers: pure functions to dicts of tag and value.

Tags begin with `<name>/` for the outcome, `<name>_search/` for the course of the search, `<name>_strength/` for the way
from the original weights to the patch, `<name>_splits/<split>/` for the numbers of a split, `<name>_slices/<slice>/`
for those of a slice, `<name>_rungs/<rung>/` for what each rung of the default's ladder does, and `<name>_localization/`
for the weights that were searched: TensorBoard and others make a group of what stands before the first slash, so the
few numbers that matter come first. The outcome is single points, not lines from before to after: smoothing would bend
those, and a reader would read wrong numbers. What is not finite is left out: several loggers refuse or misdraw it.
"""

from __future__ import annotations

import math

from lightning_nrl.metrics.rates import UPDATE_RATES
from lightning_nrl.release import ReleaseReport
from lightning_nrl.report import RepairReport, SplitReport

__all__ = [
    "SEARCH_CURVES",
    "Scalars",
    "final_numbers",
    "localization_numbers",
    "outcome",
    "release_numbers",
    "rung_numbers",
    "search_curves",
    "slice_numbers",
    "split_numbers",
    "strength_curves",
]

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
"""Tags by the names of `SearchHistory`. Its `intact` is logged as `broken`, the number that ought to be 0."""


def outcome(report: RepairReport, name: str = "repair") -> Scalars:
    """What a reviewer decides on, the most important first.

    `accepted` is 1 or 0. `known_...` and `unseen_...` are of all splits of that role together: accuracies and counts of
    samples under the weights that the model has now. In an update `..._regressions` are against the replaced model, by
    the new one as trained (`_before`) and as it is now. `refused_...` tell what refused weights would have done to
    known data.
    """
    found: Scalars = {"accepted": float(report.status == "repaired")}
    for role in ("known", "unseen"):
        split = report.pooled(role)
        if split is not None:
            found |= {f"{role}_{number}": value for number, value in _headline(split).items()}
        update = report.pooled_update(role)
        if update is not None:
            found[f"{role}_regressions_before"] = float(update.trained.broken)
            found[f"{role}_regressions"] = float(update.now.broken)
            found[f"{role}_negative_flip_rate"] = update.now.rates["negative_flip_rate"]
    if report.candidate:
        found["refused_repaired"] = float(sum(split.repaired for split in report.candidate))
        found["refused_broken"] = float(sum(split.broken for split in report.candidate))
    if report.change is not None:
        found["weights_changed"] = float(report.change.changed)
    found["seconds"] = float(sum(report.seconds.values()))
    return _finite({f"{name}/{tag}": value for tag, value in found.items()})


def release_numbers(report: ReleaseReport, name: str = "release") -> Scalars:
    """The verdict (`accepted`, 1 or 0) and the numbers of every split, `<name>/<split>/...`, and of its slices."""
    found: Scalars = {f"{name}/accepted": float(report.accepted)}
    for row in report.rows:
        place = "/".join(filter(None, (name, row.split, row.slice)))
        counts = row.counts
        numbers = {"reference_accuracy": counts.accuracy_before, "accuracy": counts.accuracy_after}
        numbers |= {rate.short: rate.of(counts) for rate in UPDATE_RATES}
        numbers |= {"nfr_upper": row.upper, "broken": counts.broken, "repaired": counts.repaired}
        found |= {f"{place}/{key}": float(value) for key, value in numbers.items()}
    return _finite(found)


def split_numbers(report: RepairReport, name: str = "repair") -> Scalars:
    """Every number of every split: counts, accuracies and the rates of `lightning_nrl.metrics`."""
    return _finite(
        {
            f"{name}_splits/{split.split}/{number}": value
            for split in report.splits
            for number, value in split.numbers.items()
        }
    )


def slice_numbers(report: RepairReport, name: str = "repair") -> Scalars:
    """Counts of every slice by the role of the data; empty where no slices were asked for."""
    found: Scalars = {}
    for one in report.slices:
        for number in ("targeted", "repaired_in_target", "repaired", "broken"):
            found[f"{name}_slices/{one.name}/{one.role}_{number}"] = float(getattr(one, number))
    return found


def rung_numbers(report: RepairReport, name: str = "repair") -> Scalars:
    """What each rung of the default's ladder repairs, breaks and changes; `held_out_...` are estimates."""
    found: Scalars = {}
    for rung in report.rungs:
        place = f"{name}_rungs/{rung.name}"
        for number in ("repaired_in_target", "repaired", "broken", "weights_changed", "seconds"):
            found[f"{place}/{number}"] = float(getattr(rung, number))
        if rung.held_out is not None:
            found[f"{place}/held_out_repaired"] = float(rung.held_out.repaired)
            found[f"{place}/held_out_broken"] = float(rung.held_out.broken)
    return found


def localization_numbers(report: RepairReport, name: str = "repair") -> Scalars:
    """How many weights were localised, N_g (the top weights of each set), and the sizes of the sets on the way."""
    found = report.localization
    if found is None:
        return {}
    return {f"{name}_localization/{k}": float(v) for k, v in {"n_g": found.n_g, **found.sizes}.items()}


def final_numbers(report: RepairReport, name: str = "repair") -> Scalars:
    """All single points: the outcome, and the numbers of splits, slices, rungs and localisation."""
    parts = (outcome, split_numbers, slice_numbers, rung_numbers, localization_numbers)
    return {tag: value for part in parts for tag, value in part(report, name).items()}


def search_curves(report: RepairReport, name: str = "repair") -> list[Scalars]:
    """The course of the search, one dict an iteration from 0, the starting swarm; empty if there was no search.

    `repaired` and `broken` count samples under the best candidate so far.
    """
    search = report.search
    if search is None:
        return []
    curves = {tag: search.history[curve] for curve, tag in SEARCH_CURVES.items() if curve in search.history}
    if search.n_passed is not None and "intact" in search.history:
        curves["broken"] = [search.n_passed - intact for intact in search.history["intact"]]
    length = max((len(curve) for curve in curves.values()), default=0)
    return [
        _finite({f"{name}_search/{tag}": curve[i] for tag, curve in curves.items() if i < len(curve)})
        for i in range(length)
    ]


def strength_curves(report: RepairReport, name: str = "repair") -> dict[int, Scalars]:
    """What the patch does along its path, by strength in percent, since loggers count in whole steps.

    Of 0, the original weights, all counts are 0. Empty if no patch was counted.
    """
    found: dict[int, Scalars] = {}
    for point in report.strength:
        counts = {"repaired_in_target": point.repaired_in_target}
        for role, flips in (("known", point.known), ("calibration", point.calibration)):
            if flips is not None:
                counts |= {f"{role}_repaired": flips.repaired, f"{role}_broken": flips.broken}
        scalars = {f"{name}_strength/{tag}": float(count) for tag, count in counts.items()}
        found.setdefault(0, dict.fromkeys(scalars, 0.0))
        found[round(100 * point.strength)] = scalars
    return dict(sorted(found.items()))


def _headline(split: SplitReport) -> Scalars:
    target = {"repaired_in_target": split.repaired_in_target, "targeted": split.targeted} if split.targeted else {}
    if 0 < split.passed_in_target < split.passed:
        target |= {"broken_in_target": split.broken_in_target, "passed_in_target": split.passed_in_target}
    counts = {**target, "broken": split.broken, "repaired": split.repaired}
    accuracies = {"accuracy_before": split.accuracy_before, "accuracy_after": split.accuracy_after}
    return {number: float(value) for number, value in counts.items()} | accuracies


def _finite(scalars: Scalars) -> Scalars:
    return {tag: float(value) for tag, value in scalars.items() if math.isfinite(value)}
