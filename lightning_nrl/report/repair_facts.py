"""Facts about a repair, one per line of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_nrl._utils.formatting import count, number, percent, plural, rough_percent
from lightning_nrl.evaluation.sample_results import TargetCounts
from lightning_nrl.records.repair_record import (
    Hashes,
    LocalizationReport,
    RepairRecord,
    SearchReport,
    WeightChange,
)
from lightning_nrl.records.splits import SetAside
from lightning_nrl.records.stats import interval, percent_up, show_confidence, upper_limit
from lightning_nrl.records.steps import CUT
from lightning_nrl.report.tables import Fact, points_of

USUAL_TASK = "Multiclass"
LISTED_LAYERS = 4
LISTED_SAMPLES = 50  # failures set aside that Markdown lists
UNSEEN_CONFIDENCE = 0.95


def repair_facts(report: RepairRecord) -> tuple[Fact, ...]:
    """Lists what the repair was asked for, what it searched and found, and the limit from
    calibration data.
    """
    facts = [("target", report.target), ("layer", layer_text(report)), ("gate", report.gate)]
    facts += [] if report.task == USUAL_TASK else [("right means", report.task)]
    if report.set_aside:
        facts.append(
            ("set aside", f"{len(report.set_aside):,} failed samples, {report.set_aside[0].why}")
        )
    facts += [
        (f"leak into {split}", f"{n:,} of its samples are known too")
        for split, n in report.leaked.items()
    ]
    if report.localization is not None:
        facts.append(("weights searched", _localization(report.localization)))
    if report.search is not None:
        facts.append(("search", _search(report.search, report.seconds.get("search"))))
    if report.held_out is not None:
        facts.append(("held-out estimate", _estimate(report.held_out, report.n_estimates)))
    cut = dict.fromkeys(step.name.partition(" ")[0] for step in report.steps if CUT in step.note)
    facts += [(CUT, ", ".join(cut))] if cut else []
    if report.chosen_strength not in (None, 1.0):
        facts.append(("strength", f"{report.chosen_strength:g} of the change that was found"))
    if report.judge is not None and report.judge.n_borderline:
        n, rounding = report.judge.n_borderline, report.judge.rounding or 0.0
        right = f"{plural(n, 'known sample')} {'is' if n == 1 else 'are'} right by less than {rounding:.2g}"
        facts.append(
            ("within rounding", f"{right}; another device or batch size may get them wrong")
        )
    if report.bounds is not None:
        facts.append(("calibration", str(report.bounds)))
    if report.change is not None:
        facts.append(
            (
                "weights changed" if report.status == "repaired" else "would change",
                _change(report.change),
            )
        )
    return tuple(facts)


def layer_text(report: RepairRecord) -> str:
    """Lists the names of the layers. Cuts a long list, and says "the whole network" if all layers
    change.
    """
    n, names = len(report.layers), ", ".join(report.layers[:LISTED_LAYERS])
    if n > 1 and n == report.provenance.n_layers:
        return f"the whole network ({n} layers)"
    return names if n <= LISTED_LAYERS else f"{names} and {n - LISTED_LAYERS} more"


def unseen_facts(report: RepairRecord) -> tuple[Fact, ...]:
    """Returns the fact that states `unseen_limit`, or () if there is no limit."""
    limit = unseen_limit(report)
    if limit is None:
        return ()
    confidence = show_confidence(UNSEEN_CONFIDENCE)
    text = f"with {confidence} confidence at most {percent_up(limit)} of new samples like these that were right will break"
    known = sum(report.leaked.values())
    return (
        ("unseen data", f"{text} (too optimistic: {known:,} of them are known)" if known else text),
    )


def unseen_limit(report: RepairRecord) -> float | None:
    """Computes an upper limit in (0, 1] on the rate at which samples like the unseen ones break
    (`upper_limit`).

    The rate is among samples that the model got right before the repair or, in an update, that the
    replaced model gets right. The confidence is `UNSEEN_CONFIDENCE`. Returns None if
    `RepairRecord.unseen` counts no such sample.
    """
    counted = report.unseen
    if counted is None or not counted.passed:
        return None
    return upper_limit(counted.broken, counted.passed, UNSEEN_CONFIDENCE)


def set_aside_facts(samples: Sequence[SetAside]) -> tuple[Fact, ...]:
    """Lists the first failures that were set aside, each with the reason, and the number of further
    failures.
    """
    facts = [
        (f"{one.split} {one.id}", f"label {one.label}, the model says {one.prediction}: {one.why}")
        for one in samples[:LISTED_SAMPLES]
    ]
    further = len(samples) - LISTED_SAMPLES
    return (
        (*facts, ("further", f"{further:,}, all in report.json")) if further > 0 else tuple(facts)
    )


def hash_facts(hashes: Hashes) -> tuple[Fact, ...]:
    """Lists the SHA-256 of the weights before and after the repair, on one line if both are equal."""
    facts = []
    for name, before, after in (
        ("layers", hashes.layers_before, hashes.layers_after),
        ("whole model", hashes.model_before, hashes.model_after),
    ):
        if before is not None and before == after:
            facts.append((f"sha256 of the {name}, unchanged", before))
        elif before is not None and after is not None:
            facts += [
                (f"sha256 of the {name} before", before),
                (f"sha256 of the {name} after", after),
            ]
    return tuple(facts)


def run_facts(report: RepairRecord) -> tuple[Fact, ...]:
    """Lists the seed and the precision of the run, and the seconds of each stage."""
    task = [("task", report.task)] if report.task == USUAL_TASK else []
    seconds = [
        (f"seconds to {stage}", f"{seconds:,.2f}") for stage, seconds in report.seconds.items()
    ]
    judge = [("judged in", str(report.judge.precision))] if report.judge is not None else []
    return (*task, ("seed", str(report.seed)), *judge, *seconds)


def _localization(localization: LocalizationReport) -> str:
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


def _search(search: SearchReport, seconds: float | None) -> str:
    text = plural(search.iterations, "iteration") + (
        f" in {seconds:,.1f} s" if seconds is not None else ""
    )
    if search.n_failed is not None and search.n_passed is not None:
        text += f", scored on {search.n_failed:,} failed and {search.n_passed:,} passed samples"
    fitness = f"{number(search.original_fitness)} -> {number(search.fitness)}"
    return f"{text}, fitness {fitness}; stopped: {search.stopped}"


def _estimate(counts: TargetCounts, choices: int) -> str:
    parts = []
    failed = counts.repaired + counts.failing
    for k, n, what in (
        (counts.repaired, failed, "failures repaired"),
        (counts.broken, counts.passed, "passed samples broken"),
    ):
        low, high = map(rough_percent, interval(k, n, choices))
        share = f" ({rough_percent(k / n)}; {low} to {high} at 90 % confidence)" if n else ""
        parts.append(f"{count(k)} of {count(n)} {what}{share}")
    return f"{', '.join(parts)}, {points_of(counts):+.1f} points"


def _change(change: WeightChange) -> str:
    share = (
        f" ({percent(change.relative)} of the layers' norm)"
        if math.isfinite(change.relative)
        else ""
    )
    return (
        f"{change.changed:,} of {change.total:,}, by at most {number(change.largest)}; "
        f"norm of the change {number(change.l2)}{share}"
    )
