"""The page of a repair: the verdict, a table of the splits, and the facts that one needs next or all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from torch import Tensor

from lightning_nrl.evaluation.sample_results import FlipCounts, TargetCounts
from lightning_nrl.report._formatting import count, from_here, number, percent, plural, rough_percent, sentence, setting
from lightning_nrl.report.html import HtmlTable, html_page, svg_of
from lightning_nrl.report.page import Block, Facts, Heading, Page, Row, Table, Text, Tone
from lightning_nrl.report.repair_plot import reviewer_figures
from lightning_nrl.report.repair_record import RepairRecord
from lightning_nrl.report.run_records import PricePoint, Rung, choice_text
from lightning_nrl.report.sample_views import SampleView
from lightning_nrl.report.splits import SplitReport
from lightning_nrl.report.stats import lower_limit, percent_up, show_confidence, upper_limit
from lightning_nrl.report.tables import (
    FLIPPED_COLUMNS,
    Fact,
    calibration_facts,
    change_text,
    flipped_splits,
    hash_facts,
    localization_text,
    outcome_table,
    rates_table,
    rounding_text,
    sample_blocks,
    search_text,
    set_aside_facts,
    slice_table,
    steps_table,
    strength_table,
    unchanged_table,
    update_table,
)

USUAL_TASK = "Multiclass"
FILE_KINDS = {"json": "report (JSON)", "markdown": "report (Markdown)", "html": "report (HTML)"}
NO_ESTIMATE = "-"
ONE_SIDED_CONFIDENCE = 0.95
"""Of each end of an interval, so that 90 % of all intervals hold the rate."""
UNSEEN_CONFIDENCE = 0.95


def page_of_repair(report: RepairRecord, full: bool = False) -> Page:
    """The verdict, a table of the splits, then what one needs next (the console) or everything else (a reviewer)."""
    if full:
        first = (*_verdict(report), *_unseen(report), *_tables(report))
        return Page((*first, *sample_blocks(report), *_details(report)))
    course = _ladder(report) or (_steps(report) if len(report.steps) > 1 else ())
    facts = Facts((*_facts(report), *_unseen_facts(report), *_files(report, from_here)))
    return Page((*_verdict(report), *_tables(report), *course, facts))


def html_of_repair(
    report: RepairRecord, views: Sequence[SampleView] = (), changes: Mapping[str, Tensor] | None = None
) -> str:
    """The whole page for a reviewer, figures where matplotlib is installed, and a table of all flipped samples."""
    page, figures = page_of_repair(report, full=True), {}
    if find_spec("matplotlib") is None:
        hint = "The figures are left out: they need matplotlib (python -m pip install matplotlib)."
        page = Page((*page.blocks, Text(hint)))
    else:
        figures = {title: svg_of(figure) for title, figure in reviewer_figures(report, changes).items()}
    galleries: dict[str, list[SampleView]] = {}
    for view in views:
        galleries.setdefault(f"Inputs of samples {view.flip} in {view.split}", []).append(view)
    return html_page(f"{report.status.capitalize()}: {report.target}", page, figures, _flipped(report), galleries)


def _flipped(report: RepairRecord) -> tuple[HtmlTable, ...]:
    rows = []
    for split in flipped_splits(report):
        for one in split.flipped:
            cells = [split.split, str(one.id), one.flip]
            cells += [report.class_name(label) for label in (one.label, one.predicted_before, one.predicted_after)]
            cells += [number(one.margin_before), number(one.margin_after), "yes" if one.in_target else "no", one.slice]
            rows.append(cells)
    return (HtmlTable(f"All {len(rows):,} samples that flipped", FLIPPED_COLUMNS, rows),) if rows else ()


def _verdict(report: RepairRecord) -> tuple[Block, ...]:
    changed = "" if report.status == "repaired" else " The model's weights are unchanged."
    heading = Heading(report.status.capitalize(), 1, report.tone)
    return heading, Text(sentence(report.reason) + changed)


def _unseen(report: RepairRecord) -> tuple[Block, ...]:
    """What unseen data say, in a sentence, for whoever reads no further."""
    return tuple(Text(sentence(f"{name}: {text}")) for name, text in _unseen_facts(report))


def _unseen_facts(report: RepairRecord) -> tuple[Fact, ...]:
    text = unseen_text(report)
    return (("unseen data", text),) if text else ()


def _tables(report: RepairRecord) -> tuple[Block, ...]:
    slices = (Heading("By slice"), slice_table(report.slices)) if report.slices else ()
    if not report.update:
        return (*_outcome(report), *slices)
    against = Heading("Against the model that it replaces"), update_table(report.update)
    return (*against, Heading("Against the new model as it was trained"), *_outcome(report), *slices)


def _outcome(report: RepairRecord) -> tuple[Block, ...]:
    if report.status == "repaired":
        return (outcome_table(report.splits),)
    unchanged = unchanged_table(report.splits)
    if not report.candidate:
        return (unchanged,)
    refused = Heading("What the refused weights would have done"), outcome_table(report.candidate)
    return (*refused, Heading("The model as it is"), unchanged)


def _ladder(report: RepairRecord) -> tuple[Block, ...]:
    if not report.rungs:
        return ()
    choice = choice_text(report.rungs, report.choice)
    why = (Text(sentence(choice)),) if choice else ()
    return Heading("The ladder, from the least change to the most"), rungs_table(report.rungs), *why


def _steps(report: RepairRecord) -> tuple[Block, ...]:
    return Heading("What the method did"), steps_table(report.steps)


def _facts(report: RepairRecord) -> tuple[Fact, ...]:
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


def _files(report: RepairRecord, shown: Callable[[str], str] = str) -> tuple[Fact, ...]:
    return tuple((FILE_KINDS.get(kind, kind), shown(path)) for kind, path in report.files.items())


def _details(report: RepairRecord) -> tuple[Block, ...]:
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


def _run(report: RepairRecord) -> tuple[Fact, ...]:
    """What the run depends on, and how long it took."""
    task = [("task", report.task)] if report.task == USUAL_TASK else []
    seconds = [(f"seconds to {stage}", f"{seconds:,.2f}") for stage, seconds in report.seconds.items()]
    judge = [("judged in", str(report.judge.precision))] if report.judge is not None else []
    return (*task, ("seed", str(report.seed)), *judge, *seconds, *report.versions.items())


def unseen_limit(report: RepairRecord) -> float | None:
    """At most this share of samples like the unseen ones breaks, with `UNSEEN_CONFIDENCE`, in (0, 1].

    Of those that were right before, or of those that the replaced model got right. It is the limit of Clopper and
    Pearson, and holds since nothing was chosen by unseen data. None if no weights changed, or nothing is unseen.
    """
    counted = _counted(report)
    return None if counted is None else upper_limit(counted.broken, counted.passed, UNSEEN_CONFIDENCE)


def unseen_text(report: RepairRecord) -> str:
    """The same in words; empty if there is no limit."""
    counted, limit = _counted(report), unseen_limit(report)
    if counted is None or limit is None:
        return ""
    text = (
        f"broken {counted.broken:,} of {counted.passed:,} that were right; "
        f"with {show_confidence(UNSEEN_CONFIDENCE)} confidence at most {percent_up(limit)} of samples like these"
    )
    known = sum(report.leaked.values())
    return f"{text} (too good a limit: {known:,} of them are known too)" if known else text


def _counted(report: RepairRecord) -> SplitReport | None:
    update = report.pooled_update("unseen")
    counted = report.pooled("unseen") if update is None else update.now
    return counted if report.status == "repaired" and counted is not None and counted.passed else None


def rungs_table(rungs: Sequence[Rung]) -> Table:
    """A column for each rung, the taken one marked; of held-out samples what the same procedure did without them."""

    def row(label: str, cell: Callable[[Rung], str], tone: Tone = "", ends_group: bool = False) -> Row:
        return Row(label, tuple(map(cell, rungs)), tone, ends_group)

    held_out = [_held_out(rung.held_out) for rung in rungs]
    return Table(
        tuple((rung.name, "taken" * rung.taken) for rung in rungs),
        (
            row("targets repaired", lambda rung: count(rung.repaired_in_target), "gain"),
            row("known samples repaired", lambda rung: count(rung.repaired)),
            row("known samples broken", lambda rung: count(rung.broken), "harm", ends_group=True),
            Row("held-out failures repaired", tuple(repaired for repaired, _, _ in held_out)),
            Row("held-out passed samples broken", tuple(broken for _, broken, _ in held_out)),
            Row("held-out accuracy, points", tuple(points for _, _, points in held_out), ends_group=True),
            row("weights changed", lambda rung: count(rung.weights_changed)),
            row("seconds", lambda rung: f"{rung.seconds:,.1f}"),
        ),
    )


def price_table(price: Sequence[PricePoint]) -> Table:
    """The most that was repaired, by how many known passed samples may break; levels that buy nothing are left out."""
    columns = (
        ("targets", "repaired"),
        ("known", "repaired"),
        ("known", "broken"),
        ("held out", "repaired"),
        ("held out", "broken"),
        ("held out", "points"),
    )
    bought = [point for i, point in enumerate(price) if not i or _counts(point) != _counts(price[i - 1])]
    rows = [Row(_level(point.allowed), (*map(count, _counts(point)), *_held_out(point.held_out))) for point in bought]
    return Table(columns, tuple(rows))


def price_text(price: Sequence[PricePoint]) -> str:
    """What it costs here that no known sample may break, in a sentence; empty where that is not known."""
    if not price or price[0].allowed:
        return ""
    none, most = price[0], max(price, key=lambda point: (point.repaired_in_target, -point.broken))
    further = most.repaired_in_target - none.repaired_in_target
    if further <= 0:
        return "nothing: of all that was tried, nothing repairs more targets by breaking known samples"
    return (
        f"{plural(further, 'target')}: {count(most.repaired_in_target)} instead of {count(none.repaired_in_target)} "
        f"would be repaired if {plural(most.broken, 'known sample')} might break"
    )


def estimate_text(held_out: TargetCounts | None, unseen: FlipCounts | None = None) -> str:
    """What held-out samples say of unseen data like them, and what came of the unseen ones; empty without the first.

    In brackets the interval of Clopper and Pearson in which a rate is expected: few samples say little.
    """
    if held_out is None:
        return ""
    counted = "" if unseen is None else f"; counted on unseen data: {_shares(unseen, of_rate=_share_only)}"
    return _shares(held_out, of_rate=_share_and_interval) + counted


def _shares(counts: FlipCounts, of_rate: Callable[[int, int], str]) -> str:
    failed = counts.repaired + counts.failing
    repaired = f"{count(counts.repaired)} of {count(failed)} failures repaired{of_rate(counts.repaired, failed)}"
    broken = f"{count(counts.broken)} of {count(counts.passed)} passed samples broken"
    return f"{repaired}, {broken}{of_rate(counts.broken, counts.passed)}, {_points(counts)} points"


def _share_only(k: int, n: int) -> str:
    return f" ({rough_percent(k / n)})" if n else ""


def _share_and_interval(k: int, n: int) -> str:
    if not n:
        return ""
    low, high = lower_limit(k, n, ONE_SIDED_CONFIDENCE), upper_limit(k, n, ONE_SIDED_CONFIDENCE)
    return f" ({rough_percent(k / n)}; {rough_percent(low)} to {rough_percent(high)} at 90 % confidence)"


def _counts(point: PricePoint) -> tuple[int, int, int]:
    return point.repaired_in_target, point.repaired, point.broken


def _held_out(counts: TargetCounts | None) -> tuple[str, str, str]:
    if counts is None:
        return NO_ESTIMATE, NO_ESTIMATE, NO_ESTIMATE
    failed = counts.repaired + counts.failing
    shares = f"{count(counts.repaired)} of {count(failed)}", f"{count(counts.broken)} of {count(counts.passed)}"
    return *shares, _points(counts)


def _points(counts: FlipCounts) -> str:
    return f"{100 * (counts.accuracy_after - counts.accuracy_before):+.1f}"


def _level(allowed: float) -> str:
    if not allowed:
        return "none may break"
    return "any may break" if allowed == 1 else f"{percent(allowed)} may break"
