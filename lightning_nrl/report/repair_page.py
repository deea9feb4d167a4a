"""The page of a repair: the verdict, a table of the splits, and the facts that one needs next or all of them."""

from __future__ import annotations

from collections.abc import Callable

from lightning_nrl.report._formatting import from_here, sentence, setting
from lightning_nrl.report.ladder import choice_text, estimate_text, price_table, price_text, rungs_table
from lightning_nrl.report.page import Block, Facts, Heading, Page, Text, Tone
from lightning_nrl.report.repair_report import RepairReport, Status
from lightning_nrl.report.report_base import page_of
from lightning_nrl.report.sample_tables import sample_blocks
from lightning_nrl.report.tables import (
    Fact,
    calibration_facts,
    change_text,
    hash_facts,
    localization_text,
    outcome_table,
    rates_table,
    rounding_text,
    search_text,
    set_aside_facts,
    slice_table,
    steps_table,
    strength_table,
    unchanged_table,
    update_table,
)
from lightning_nrl.report.unseen_limit import unseen_text

__all__ = ["page_of_repair"]

STATUS_TONES: dict[Status, Tone] = {
    "repaired": "good",
    "refused": "warn",
    "not repaired": "warn",
    "nothing to repair": "good",
}
USUAL_TASK = "Multiclass"
FILE_KINDS = {"json": "report (JSON)", "markdown": "report (Markdown)", "html": "report (HTML)"}


@page_of.register
def page_of_repair(report: RepairReport, full: bool = False) -> Page:
    """The verdict, a table of the splits, then what one needs next (the console) or everything else (a reviewer)."""
    if full:
        first = (*_verdict(report), *_unseen(report), *_tables(report))
        return Page((*first, *sample_blocks(report), *_details(report)))
    course = _ladder(report) or (_steps(report) if len(report.steps) > 1 else ())
    facts = Facts((*_facts(report), *_unseen_facts(report), *_files(report, from_here)))
    return Page((*_verdict(report), *_tables(report), *course, facts))


def _verdict(report: RepairReport) -> tuple[Block, ...]:
    changed = "" if report.status == "repaired" else " The model's weights are unchanged."
    heading = Heading(report.status.capitalize(), 1, STATUS_TONES[report.status])
    return heading, Text(sentence(report.reason) + changed)


def _unseen(report: RepairReport) -> tuple[Block, ...]:
    """What unseen data say, in a sentence, for whoever reads no further."""
    return tuple(Text(sentence(f"{name}: {text}")) for name, text in _unseen_facts(report))


def _unseen_facts(report: RepairReport) -> tuple[Fact, ...]:
    text = unseen_text(report)
    return (("unseen data", text),) if text else ()


def _tables(report: RepairReport) -> tuple[Block, ...]:
    slices = (Heading("By slice"), slice_table(report.slices)) if report.slices else ()
    if not report.update:
        return (*_outcome(report), *slices)
    against = Heading("Against the model that it replaces"), update_table(report.update)
    return (*against, Heading("Against the new model as it was trained"), *_outcome(report), *slices)


def _outcome(report: RepairReport) -> tuple[Block, ...]:
    if report.status == "repaired":
        return (outcome_table(report.splits),)
    unchanged = unchanged_table(report.splits)
    if not report.candidate:
        return (unchanged,)
    refused = Heading("What the refused weights would have done"), outcome_table(report.candidate)
    return (*refused, Heading("The model as it is"), unchanged)


def _ladder(report: RepairReport) -> tuple[Block, ...]:
    if not report.rungs:
        return ()
    choice = choice_text(report.rungs, report.choice)
    why = (Text(sentence(choice)),) if choice else ()
    return Heading("The ladder, from the least change to the most"), rungs_table(report.rungs), *why


def _steps(report: RepairReport) -> tuple[Block, ...]:
    return Heading("What the method did"), steps_table(report.steps)


def _facts(report: RepairReport) -> tuple[Fact, ...]:
    facts = [("target", report.target), ("layer", ", ".join(report.layers)), ("gate", report.gate)]
    # Of classes everybody knows what right is.
    facts += [] if report.task == USUAL_TASK else [("right means", report.task)]
    if report.set_aside:
        facts.append(("set aside", f"{len(report.set_aside):,} failed samples, {report.set_aside[0].why}"))
    facts += [(f"leak into {split}", f"{n:,} of its samples are known too") for split, n in report.leaked.items()]
    if report.localization is not None:
        facts.append(("weights searched", localization_text(report.localization)))
    if report.search is not None:
        facts.append(("search", search_text(report.search, report.seconds.get("search"))))
    taken = next((rung for rung in report.rungs if rung.taken), None)
    if taken is not None and taken.held_out is not None:
        unseen = report.pooled("unseen") if report.status == "repaired" else None
        counted = None if unseen is None else unseen.counts
        facts.append(("held-out estimate", estimate_text(taken.held_out, counted)))
    if price_text(report.price):
        facts.append(("zero broken costs", price_text(report.price)))
    if report.chosen_strength not in (None, 1.0):
        facts.append(("strength", f"{report.chosen_strength:g} of the change that was found"))
    if report.judge is not None and report.judge.within_rounding:
        facts.append(("within rounding", rounding_text(report.judge)))
    if report.bounds is not None:
        facts += calibration_facts(report.bounds)
    if report.change is not None:
        facts.append(("weights changed" if report.status == "repaired" else "would change", change_text(report.change)))
    return tuple(facts)


def _files(report: RepairReport, shown: Callable[[str], str] = str) -> tuple[Fact, ...]:
    return tuple((FILE_KINDS.get(kind, kind), shown(path)) for kind, path in report.files.items())


def _details(report: RepairReport) -> tuple[Block, ...]:
    shown = report.candidate or report.splits
    blocks: list[Block] = [Heading("What was done"), Facts((*_facts(report), *_files(report)))]
    blocks += _ladder(report)
    if report.price:
        blocks += [Heading("What it costs that no known sample may break"), price_table(report.price)]
    if report.steps:
        blocks += _steps(report)
    if report.strength:
        path = strength_table(report.strength, report.chosen_strength)
        blocks += [Heading("From the original weights (0) to the change that was found (1)"), path]
    if report.status == "repaired" or report.candidate:
        blocks += [Heading("Rates"), rates_table(shown)]
    if report.set_aside:
        blocks += [Heading("Failures that were set aside"), Facts(set_aside_facts(report.set_aside))]
    if report.hashes is not None:
        blocks += [Heading("Weights"), Facts(hash_facts(report.hashes))]
    blocks += [Heading("Run"), Facts(_run(report))]
    if report.settings:
        settings = tuple((name, setting(value)) for name, value in report.settings.items())
        blocks += [Heading("Settings"), Facts(settings)]
    return tuple(blocks)


def _run(report: RepairReport) -> tuple[Fact, ...]:
    """What the run depends on, and how long it took."""
    task = [("task", report.task)] if report.task == USUAL_TASK else []
    seconds = [(f"seconds to {stage}", f"{seconds:,.2f}") for stage, seconds in report.seconds.items()]
    judge = [("judged in", str(report.judge.precision))] if report.judge is not None else []
    return (*task, ("seed", str(report.seed)), *judge, *seconds, *report.versions.items())
