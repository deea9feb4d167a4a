"""A sweep as a page: a line for each setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

from lightning_nrl.analysis.sweep.run import ROLES, Run
from lightning_nrl.report.document import Block, Facts, Heading, Page, Row, Table, Text

if TYPE_CHECKING:
    from lightning_nrl.analysis.sweep.sweep_result import SweepResult

__all__ = ["sweep_page"]

NOTE = (
    "Means over seeds, standard deviations in brackets. Free of regressions: the share of runs that repair something "
    "known and break nothing known. No gate judged."
)


def sweep_page(result: SweepResult) -> Page:
    """What there is to say, then the table."""
    blocks: list[Block] = [Heading("Sweep", 1), Text(_summary(result))]
    if result.runs:
        blocks += [_table(result), Text(NOTE)]
    facts = tuple((name, value) for name, value in (("target", result.target), ("layer", result.layer)) if value)
    return Page((*blocks, *((Facts(facts),) if facts else ())))


def _summary(result: SweepResult) -> str:
    if not result.runs:
        return "No run."
    first, names = result.runs[0], {run.setting for run in result.runs}
    text = f"{len(result.runs):,} run{'s' * (len(result.runs) > 1)} of {len(names):,} setting{'s' * (len(names) > 1)}"
    text += f" in {sum(run.seconds for run in result.runs):,.0f} s."
    text += f" {first.known_targeted:,} failures to repair"
    for role in ROLES:
        if first.has(role):
            counts = first.counts(role)
            text += f", {counts.passed:,} of {counts.n:,} {role} samples right before"
    return f"{text}."


def _table(result: SweepResult) -> Table:
    first = result.runs[0]
    columns = [("runs", ""), ("repaired", f"of {first.known_targeted:,}"), ("broken", "known"), ("free of", "regr.")]
    measures: list[Callable[[Run], float]] = [lambda run: run.known_repaired_in_target, lambda run: run.known_broken]
    later = [role for role in ROLES[1:] if first.has(role)]
    for role in later:
        columns += [("repaired", role), ("broken", role), ("accuracy", "points")]
    rows = []
    for name in dict.fromkeys(run.setting for run in result.runs):
        runs = result.of(name)
        free = sum(run.regression_free for run in runs)
        cells = [f"{len(runs):,}", *(_mean(runs, measure) for measure in measures), f"{free / len(runs):.0%}"]
        for role in later:
            cells += [
                _mean(runs, lambda run, role=role: run.counts(role).repaired),  # type: ignore[misc]
                _mean(runs, lambda run, role=role: run.counts(role).broken),  # type: ignore[misc]
                _mean(runs, lambda run, role=role: _points(run, role), sign="+"),  # type: ignore[misc]
            ]
        rows.append(Row(name, tuple(cells)))
    return Table(tuple(columns), tuple(rows))


def _points(run: Run, role: str) -> float:
    counts = run.counts(role)
    return 100 * (counts.repaired - counts.broken) / max(1, counts.n)


def _mean(runs: Sequence[Run], measure: Callable[[Run], float], sign: str = "") -> str:
    values = [measure(run) for run in runs]
    middle = f"{mean(values):{sign},.1f}"
    return f"{middle} ({stdev(values):,.1f})" if len(values) > 1 else middle
