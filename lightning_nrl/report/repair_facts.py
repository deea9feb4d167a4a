"""Facts about a repair, one per line of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_nrl._utils.formatting import number, percent, plural, rough_percent
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.evaluation.stats import interval, percent_up, show_confidence
from lightning_nrl.records import SetAside
from lightning_nrl.records.repair_record import (
    UNSEEN_CONFIDENCE,
    Hashes,
    Judge,
    LocalizationReport,
    RepairRecord,
    SearchReport,
    WeightChange,
)
from lightning_nrl.records.steps import CUT
from lightning_nrl.report.tables import Fact

NEAR_COPIES = (
    "held-out samples resemble used samples beside them in the data set, so this estimate is too "
    "good. HINT: say which samples belong together, such as those of a patient or a video: "
    "`samples=SampleOptions(groups=...)`"
)
USUAL_TASK = "Multiclass"
LISTED_LAYERS = 4
LISTED_SAMPLES = 50  # failures set aside that Markdown lists


def repair_facts(report: RepairRecord) -> list[Fact]:
    """Lists what the repair was asked for, what it searched and found, and the limit."""
    facts = [("target", report.target), ("layer", layer_text(report)), ("gate", report.gate)]
    if report.task != USUAL_TASK:
        facts.append(("right means", report.task))
    if report.set_aside:
        reason = report.set_aside[0].why
        facts.append(("set aside", f"{len(report.set_aside):,} failed samples, {reason}"))
    for split, n in report.leaked.items():
        facts.append((f"leak into {split}", f"{n:,} of its samples are known too, and not counted"))
    if report.localization is not None:
        facts.append(("weights searched", _localization(report.localization)))
    if report.search is not None:
        facts.append(("search", _search(report.search, report.seconds.get("search"))))
    if report.held_out is not None:
        facts.append(("held-out estimate", _estimate(report.held_out, report.n_estimates)))
        if report.near_copies:
            facts.append(("near-copies", NEAR_COPIES))
    cut = dict.fromkeys(step.name for step in report.steps if step.was_cut)
    if cut:
        facts.append((CUT, ", ".join(cut)))
    if report.chosen_strength not in (None, 1.0):
        facts.append(("strength", f"{report.chosen_strength:g} of the change that was found"))
    if report.judge is not None and report.judge.n_borderline:
        facts.append(("within rounding", _borderline(report.judge)))
    if report.bounds is not None:
        facts.append(("calibration", str(report.bounds)))
    if report.change is not None:
        name = "weights changed" if report.status == "repaired" else "would change"
        facts.append((name, _change(report.change)))
    if report.passes:
        passes = f"{sum(report.passes.values()):,.1f} passes over the known data"
        facts.append(("cost", f"{sum(report.seconds.values()):,.1f} s, {passes}"))
    return facts


def _borderline(judge: Judge) -> str:
    are = "is" if judge.n_borderline == 1 else "are"
    return (
        f"{plural(judge.n_borderline, 'known sample')} {are} right by less than "
        f"{judge.rounding or 0.0:.2g}; "
        "another device or batch size may get them wrong"
    )


def layer_text(report: RepairRecord) -> str:
    """Lists the names of the layers. A long list is cut, and all layers are the whole network."""
    n = len(report.layers)
    if n > 1 and n == report.provenance.n_layers:
        return f"the whole network ({n} layers)"
    names = ", ".join(report.layers[:LISTED_LAYERS])
    if n > LISTED_LAYERS:
        names += f" and {n - LISTED_LAYERS} more"
    return names


def unseen_facts(report: RepairRecord) -> list[Fact]:
    """Returns the fact that states `RepairRecord.unseen_limit`, or [] if there is no limit."""
    limit = report.unseen_limit
    if limit is None:
        return []
    events = "samples like these that were right will break"
    groups, units = report.unseen_groups, report.test_units
    if groups is not None:
        if units == "groups":
            events = "groups like these will have a sample that was right and breaks"
        events += f" (here {groups.broken:,} of {groups.passed:,} {units})"
    text = (
        f"with {show_confidence(UNSEEN_CONFIDENCE)} confidence at most {percent_up(limit)} of new "
        f"{events}"
    )
    return [("unseen data", text)]


def set_aside_facts(samples: Sequence[SetAside]) -> list[Fact]:
    """Lists the first failures that were set aside, with the reasons, and counts the others."""
    facts = []
    for sample in samples[:LISTED_SAMPLES]:
        facts.append(
            (
                f"{sample.split} {sample.id}",
                f"label {sample.label}, the model says {sample.prediction}: {sample.why}",
            )
        )
    further = len(samples) - LISTED_SAMPLES
    if further > 0:
        facts.append(("further", f"{further:,}, all in report.json"))
    return facts


def hash_facts(hashes: Hashes) -> list[Fact]:
    """Lists the SHA-256 of the weights before and after the repair, once if both are equal."""
    facts = []
    for name, before, after in (
        ("layers", hashes.layers_before, hashes.layers_after),
        ("whole model", hashes.model_before, hashes.model_after),
    ):
        if before is None or after is None:
            continue
        if before == after:
            facts.append((f"sha256 of the {name}, unchanged", before))
        else:
            facts.append((f"sha256 of the {name} before", before))
            facts.append((f"sha256 of the {name} after", after))
    return facts


def run_facts(report: RepairRecord) -> list[Fact]:
    """Lists the seed and the precision of the run."""
    facts = []
    if report.task == USUAL_TASK:
        facts.append(("task", report.task))
    facts.append(("seed", str(report.seed)))
    if report.judge is not None:
        facts.append(("judged in", str(report.judge.precision)))
    return facts


def _localization(localization: LocalizationReport) -> str:
    sizes = localization.sizes
    text = f"{sizes.get('localized', 0):,}"
    if "total" in sizes:
        text += f" of {sizes['total']:,}"
    if localization.requested is not None and localization.requested != sizes.get("localized"):
        text += f", the nearest to the {localization.requested:,} asked for"
    if {"failed", "passed", "both"} <= sizes.keys():
        text += (
            f"; {sizes['failed']:,} matter for the failed data, {sizes['passed']:,} for the "
            f"passed, {sizes['both']:,} for both (the top {localization.n_g:,} by each impact)"
        )
    return text


def _search(search: SearchReport, seconds: float | None) -> str:
    text = plural(search.iterations, "iteration")
    if seconds is not None:
        text += f" in {seconds:,.1f} s"
    text += f", scored on {search.n_failed:,} failed and {search.n_passed:,} passed samples"
    fitness = f"{number(search.original_fitness)} -> {number(search.fitness)}"
    return f"{text}, fitness {fitness}; stopped: {search.stopped}"


def _estimate(counts: TargetCounts, choices: int) -> str:
    units = counts.units
    with_samples = "groups with " if counts.groups else ""
    failures, passed = f"{with_samples}failures repaired", f"{with_samples}passed samples broken"
    parts = (
        f"{_rate(units.repaired, units.failed, failures, choices)}, "
        f"{_rate(units.broken, units.passed, passed, choices)}"
    )
    return f"{parts}, {counts.points:+.1f} points"


def _rate(k: int, n: int, samples: str, choices: int) -> str:
    text = f"{k:,} of {n:,} {samples}"
    if not n:
        return text
    low, high = interval(k, n, choices)
    limits = f"{rough_percent(low)} to {rough_percent(high)} at 90 % confidence"
    return f"{text} ({rough_percent(k / n)}; {limits})"


def _change(change: WeightChange) -> str:
    text = (
        f"{change.changed:,} of {change.total:,}, by at most {number(change.largest)}; "
        f"norm of the change {number(change.l2)}"
    )
    if math.isfinite(change.relative):
        text += f" ({percent(change.relative)} of the layers' norm)"
    return text
