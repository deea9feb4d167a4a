"""A sweep as a page: a line for each setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.report._formatting import count, plural
from lightning_nrl.report.page import Block, Facts, Heading, Page, Row, Table, Text
from lightning_nrl.report.splits import ROLES, Role

if TYPE_CHECKING:
    from lightning_nrl.analysis.sweep.run import Run
    from lightning_nrl.analysis.sweep.sweep_result import SweepResult

__all__ = ["page_of_sweep"]

SWEEP_NOTE = (
    "Means over seeds, standard deviations in brackets. Free of regressions: the share of runs that repair something "
    "known and break nothing known. No gate judged."
)


def page_of_sweep(result: SweepResult) -> Page:
    """What there is to say, then the table."""
    blocks: list[Block] = [Heading("Sweep", 1), Text(_summary(result))]
    blocks += [_table(result), Text(SWEEP_NOTE)] if result.runs else []
    facts = tuple((name, value) for name, value in (("target", result.target), ("layer", result.layer)) if value)
    return Page((*blocks, *((Facts(facts),) if facts else ())))


def _summary(result: SweepResult) -> str:
    if not result.runs:
        return "No run."
    first, names = result.runs[0], {run.setting for run in result.runs}
    text = f"{plural(len(result.runs), 'run')} of {plural(len(names), 'setting')}"
    text += f" in {sum(run.seconds for run in result.runs):,.0f} s."
    text += f" {first.known.targeted:,} failures to repair"
    for role in ROLES:
        if first.has(role):
            counts = first.counts(role)
            text += f", {counts.passed:,} of {counts.n:,} {role} samples right before"
    return f"{text}."


def _table(result: SweepResult) -> Table:
    first = result.runs[0]
    columns = [("runs", ""), ("repaired", f"of {first.known.targeted:,}"), ("broken", "known"), ("free of", "regr.")]
    measures: list[Callable[[Run], float]] = [lambda run: run.known.repaired_in_target, lambda run: run.known.broken]
    later = [role for role in ROLES[1:] if first.has(role)]
    for role in later:
        columns += [("repaired", role), ("broken", role), ("accuracy", "points")]
    rows = []
    for name in dict.fromkeys(run.setting for run in result.runs):
        runs = result.of(name)
        free = sum(run.regression_free for run in runs)
        cells = [count(len(runs)), *(_mean(runs, measure) for measure in measures), f"{free / len(runs):.0%}"]
        for role in later:
            cells += _role_cells(runs, role)
        rows.append(Row(name, tuple(cells)))
    return Table(tuple(columns), tuple(rows))


def _role_cells(runs: Sequence[Run], role: Role) -> list[str]:
    """Repaired, broken and the change of accuracy in points."""
    return [
        _mean(runs, lambda run: run.counts(role).repaired),
        _mean(runs, lambda run: run.counts(role).broken),
        _mean(runs, lambda run: _points(run.counts(role)), sign="+"),
    ]


def _points(counts: FlipCounts) -> float:
    return 100 * (counts.repaired - counts.broken) / max(1, counts.n)


def _mean(runs: Sequence[Run], measure: Callable[[Run], float], sign: str = "") -> str:
    values = [measure(run) for run in runs]
    middle = f"{mean(values):{sign},.1f}"
    return f"{middle} ({stdev(values):,.1f})" if len(values) > 1 else middle
