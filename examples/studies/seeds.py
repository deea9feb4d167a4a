"""The same repair with several seeds of data, training and repair: one table, mean and worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from rich import box
from rich.table import Table

from lightning_nrl import RepairReport


def reports_of(folder: Path, seeds: Sequence[int], run: Callable[[int, Path], RepairReport]) -> list[RepairReport]:
    """One report a seed. What was run before is read from its `report.json`, so that a stopped study goes on.

    Args:
        folder: gets a folder for each seed.
        seeds: which ones.
        run: repairs with a seed, and leaves its files in a folder.
    """
    found = []
    for seed in seeds:
        own = folder / f"seed_{seed}"
        path = own / "report.json"
        report = RepairReport.from_json(path.read_text()) if path.exists() else run(seed, own)
        found.append(report)
        known, unseen = report.pooled("known"), report.pooled("unseen")
        print(
            f"seed {seed}: {known.repaired_in_target} of {known.targeted} repaired, {known.broken} known broken, "
            f"unseen {unseen.repaired} : {unseen.broken}, {sum(report.seconds.values()):.0f} s",
            flush=True,
        )
    return found


def table_of(reports: Sequence[RepairReport], title: str) -> Table:
    """One row a seed, then their mean and the worst of each column; accuracy is on unseen data, time in seconds."""
    accepted = sum(report.status == "repaired" for report in reports)
    table = Table(
        title=title,
        caption=f"known: the repair saw it; unseen: only counted. Accepted: {accepted} of {len(reports)} repairs.",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    heads = ("\n\nseed", "known:\n\ntarget", "\nre-\npaired", "\n\nbroken", "unseen:\nre-\npaired", "\n\nbroken")
    for head in (*heads, "accu-\nracy\nafter", "\n\ngain", "\n\ntime"):
        table.add_column(head, justify="right", no_wrap=True)
    rows = []
    for report in reports:
        known, unseen = report.pooled("known"), report.pooled("unseen")
        before, after = unseen.accuracy_before, unseen.accuracy_after
        counts = (known.targeted, known.repaired_in_target, known.broken, unseen.repaired, unseen.broken)
        rows.append((*counts, after, after - before, sum(report.seconds.values())))
        table.add_row(str(report.seed), *_cells(rows[-1], "d"))
    table.add_section()
    columns = list(zip(*rows, strict=True))
    table.add_row("mean", *_cells([mean(column) for column in columns], ".1f"))
    # Many broken and many seconds are bad; of all else few.
    worst = [max(column) if i in (2, 4, 7) else min(column) for i, column in enumerate(columns)]
    table.add_row("worst", *_cells(worst, "d"))
    return table


def _cells(row: Sequence[float], counts: str) -> list[str]:
    formats = [counts] * 5 + [".3f", "+.3f", ".0f"]
    return [format(value, how) for value, how in zip(row, formats, strict=True)]
