"""The report of one repair with its page: verdict, outcome by split, details."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_nrl._utils.formatting import format_setting, number, relative_to_cwd, sentence
from lightning_nrl.records import RepairRecord
from lightning_nrl.records.splits import pool_by_role
from lightning_nrl.report.figures import Plotted
from lightning_nrl.report.html import HtmlTable, Report, html_page, svg_of
from lightning_nrl.report.page import Block, FactList, Heading, Page, Text, Tone
from lightning_nrl.report.repair_facts import (
    hash_facts,
    repair_facts,
    run_facts,
    set_aside_facts,
    unseen_facts,
)
from lightning_nrl.report.repair_plot import draw_repair, reviewer_figures
from lightning_nrl.report.sample_views import SampleView, by_flip
from lightning_nrl.report.tables import (
    FLIPPED_COLUMNS,
    Fact,
    caution_table,
    flipped_rows,
    outcome_table,
    price_table,
    rates_table,
    rungs_table,
    sample_blocks,
    slice_table,
    stages_table,
    steps_table,
    strength_table,
    unchanged_table,
    update_table,
)
from lightning_nrl.report.verdicts import Verdict, verdict_on

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RULES_OF_RUNGS = {
    "training": (
        "`training` starts from the original weights and takes the place of the rungs before it: "
        "if it repairs more targets, unless it gains significantly less on held-out samples; if it "
        "repairs at least half as many, only if it gains significantly more there."
    ),
    "push": (
        "`exact` and `push` are kept if they repair more targets and break no more of the samples "
        "that they do not use than they repair."
    ),
}
"""When rungs are kept; a rule is shown if the report has the rung that is its key."""
FILE_KINDS = {"json": "report (JSON)", "markdown": "report (Markdown)", "html": "report (HTML)"}


class RepairReport(RepairRecord, Report, Plotted):
    """The report of a repair, with the data of :class:`RepairRecord`, shown as tables."""

    def __repr__(self) -> str:
        parts = [self.verdict.headline]
        for role, split in pool_by_role(self.splits).items():
            parts.append(f"{role} {split.repaired} repaired, {split.broken} broken of {split.n}")
        return f"<RepairReport: {'; '.join(parts)}>"

    @property
    def verdict(self) -> Verdict:
        """The verdict: the promise on known data, the evidence on other data, and advice."""
        return verdict_on(self)

    @property
    def tone(self) -> Tone:
        return self.verdict.tone

    def page(self, full: bool = False) -> Page:
        blocks = self._first_blocks(full)
        if full:
            return Page([*blocks, *sample_blocks(self), *_details(self)])
        if not self.rungs and len(self.steps) > 1:
            blocks += _steps(self)
        facts = FactList([*repair_facts(self), *_files(self, relative_to_cwd)])
        return Page([*blocks, facts])

    def _first_blocks(self, full: bool) -> list[Block]:
        verdict = self.verdict
        blocks = [
            Heading(verdict.headline, 1, verdict.tone),
            FactList([*verdict.facts, *unseen_facts(self)]),
            Text(sentence(self.reason)),
            *_tables(self),
        ]
        if self.choice and not self.rungs:
            blocks.append(Text(sentence(self.choice)))
        if self.rungs:
            blocks += _climb(self, full)
        return blocks

    def figure(self) -> Figure:
        return draw_repair(self)

    def to_html(
        self, views: Sequence[SampleView] = (), changes: Mapping[str, Tensor] | None = None
    ) -> str:
        page, figures = self.full_page(), {}
        if find_spec("matplotlib") is None:
            hint = (
                "The figures are left out: they need matplotlib (python -m pip install matplotlib)."
            )
            page = Page([*page.blocks, Text(hint)])
        else:
            for title, figure in reviewer_figures(self, changes).items():
                figures[title] = svg_of(figure)
        galleries = {f"Inputs of samples {title}": group for title, group in by_flip(views).items()}
        tables = []
        rows = [list(map(_cell, row)) for row in flipped_rows(self)]
        if rows:
            title = f"All {len(rows):,} samples that flipped"
            tables.append(HtmlTable(title, FLIPPED_COLUMNS, rows))
        title = f"{self.status.capitalize()}: {self.target}"
        n_first = len(self._first_blocks(full=True))
        return html_page(title, page, figures, tables, galleries, n_first)


def _cell(value: str | float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    return str(value)


def _tables(report: RepairRecord) -> Iterator[Block]:
    if report.update:
        yield Heading("Against the model that it replaces")
        yield update_table(report.update)
        yield Heading("Against the new model as it was trained")
    if report.candidate:
        yield Heading("Effect of the refused weights")
        yield outcome_table(report.candidate)
        yield Heading("The unchanged model")
    if report.status == "repaired":
        yield outcome_table(report.splits)
    else:
        yield unchanged_table(report.splits)
    if report.slices:
        yield Heading("By slice")
        yield slice_table(report.slices)


def _climb(report: RepairRecord, has_rules: bool) -> Iterator[Block]:
    yield Heading("The climb, each rung from where the last one stands")
    yield rungs_table(report.rungs)
    names = [rung.name for rung in report.rungs]
    rules = [rule for name, rule in RULES_OF_RUNGS.items() if has_rules and name in names]
    if rules:
        yield Text(" ".join(rules))
    if report.choice:
        yield Text(sentence(report.choice))


def _steps(report: RepairRecord) -> list[Block]:
    return [Heading("What the method did"), steps_table(report.steps)]


def _files(report: RepairRecord, show: Callable[[str], str] = str) -> list[Fact]:
    return [(FILE_KINDS.get(kind, kind), show(path)) for kind, path in report.files.items()]


def _details(report: RepairRecord) -> list[Block]:
    blocks: list[Block] = [
        Heading("What was done"),
        FactList([*repair_facts(report), *_files(report)]),
    ]
    if report.price:
        blocks += [Heading("The price of no broken known sample"), price_table(report.price)]
    if report.caution:
        blocks += [Heading("What another caution would give"), caution_table(report.caution)]
    if report.steps:
        blocks += _steps(report)
    if report.strength:
        path = strength_table(report.strength, report.chosen_strength)
        blocks += [Heading("By strength, from the original weights (0) to the patch (1)"), path]
    if report.status == "repaired" or report.candidate:
        blocks += [Heading("Rates"), rates_table(report.candidate or report.splits)]
    if report.set_aside:
        blocks += [Heading("Failures set aside"), FactList(set_aside_facts(report.set_aside))]
    if report.hashes is not None:
        blocks += [Heading("Weights"), FactList(hash_facts(report.hashes))]
    blocks += [Heading("Run"), FactList(run_facts(report))]
    if report.seconds:
        blocks.append(stages_table(report.seconds, report.passes))
    if report.settings:
        settings = [(name, format_setting(value)) for name, value in report.settings.items()]
        blocks += [Heading("Settings"), FactList(settings)]
    return blocks
