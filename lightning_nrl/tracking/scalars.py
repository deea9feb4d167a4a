"""A report as numbers for loggers: pure functions to dicts of tag and value, one dict a step.

Every tag begins with the `name` of the repair. Numbers that are not finite are left out, since several loggers refuse
or misdraw them.
"""

from __future__ import annotations

import math

from lightning_nrl.report import RepairReport, SplitReport

__all__ = ["CURVES", "Scalars", "before_after", "search_curves", "verdict"]

Scalars = dict[str, float]
"""Values by tag."""

CURVES = {
    "best": "best_fitness",
    "mean": "mean_fitness",
    "patched": "repaired",
    "loss_failed": "loss_failed",
    "loss_passed": "loss_passed",
    "diversity": "diversity",
}
"""Tags by the names of `SearchHistory`. Its `intact` is logged as `broken`, the number that ought to be 0."""


def search_curves(report: RepairReport, name: str = "repair") -> list[Scalars]:
    """The course of the search, one dict an iteration from 0, the starting swarm; empty if there was no search.

    `repair/search/repaired` and `repair/search/broken` count samples under the best candidate so far.
    """
    search = report.search
    if search is None:
        return []
    curves = {tag: search.history[name] for name, tag in CURVES.items() if name in search.history}
    if search.n_passed is not None and "intact" in search.history:
        curves["broken"] = [search.n_passed - intact for intact in search.history["intact"]]
    length = max((len(curve) for curve in curves.values()), default=0)
    return [
        _finite({f"{name}/search/{tag}": curve[i] for tag, curve in curves.items() if i < len(curve)})
        for i in range(length)
    ]


def before_after(report: RepairReport, name: str = "repair") -> tuple[Scalars, Scalars]:
    """The state of every split before and after the repair, the same tags twice, to be drawn as a line of two points.

    `repair/<split>/accuracy`, and counts of samples: `wrong_in_target`, `repaired` and `broken`, the latter two from 0.
    """
    before: Scalars = {}
    after: Scalars = {}
    for split in report.splits:
        for tag, (old, new) in _states(split).items():
            before[f"{name}/{split.split}/{tag}"] = old
            after[f"{name}/{split.split}/{tag}"] = new
    return _finite(before), _finite(after)


def verdict(report: RepairReport, name: str = "repair") -> Scalars:
    """The outcome in few numbers, `repair/verdict/...`.

    `accepted` is 1 or 0. `known_...` and `unseen_...` are of all splits of that role together: `..._target_repaired`
    the share of the targeted samples that are right now, `..._repaired` and `..._broken` counts, targeted or not.
    `refused_...` tell what refused weights would have done.
    """
    out: Scalars = {"accepted": float(report.status == "repaired")}
    for role in ("known", "unseen"):
        split = report.pooled(role)
        if split is not None:
            out |= _outcome(role, split)
    if report.candidate:
        out["refused_repaired"] = float(sum(split.repaired for split in report.candidate))
        out["refused_broken"] = float(sum(split.broken for split in report.candidate))
    if report.change is not None:
        out["weights_changed"] = float(report.change.changed)
        out["relative_change"] = report.change.relative
    if report.search is not None:
        out["iterations"] = float(report.search.iterations)
    out["seconds"] = float(sum(report.seconds.values()))
    return _finite({f"{name}/verdict/{tag}": value for tag, value in out.items()})


def _states(split: SplitReport) -> dict[str, tuple[float, float]]:
    states = {
        "accuracy": (split.accuracy_before, split.accuracy_after),
        "repaired": (0.0, float(split.repaired)),
        "broken": (0.0, float(split.broken)),
    }
    if split.targeted:
        states["wrong_in_target"] = (float(split.targeted), float(split.targeted - split.repaired_in_target))
    return states


def _outcome(role: str, split: SplitReport) -> Scalars:
    return {
        f"{role}_target_repaired": split.rates["repair_rate"],
        f"{role}_repaired": float(split.repaired),
        f"{role}_broken": float(split.broken),
        f"{role}_accuracy_gain": split.accuracy_after - split.accuracy_before,
        f"{role}_negative_flip_rate": split.rates["negative_flip_rate"],
    }


def _finite(scalars: Scalars) -> Scalars:
    return {tag: float(value) for tag, value in scalars.items() if math.isfinite(value)}
