"""The table of the example that has rows of Table II beside the package's methods."""

from __future__ import annotations

import sys
from dataclasses import replace

from repository import ROOT
from rich.console import Console
from toy_repairs import known, quick, trained, unseen

from lightning_nrl import Target, repair_module

sys.path.insert(0, str(ROOT / "examples" / "studies"))
from paper_rows import table_of


def test_any_settings_make_a_table_with_what_breaks_of_the_target() -> None:
    report = repair_module(trained(), known(), quick(target=Target.label(0)), unseen=unseen()).report
    *others, later = report.splits
    counts = replace(later.counts, kept=50, broken=4, repaired=9, failing=17, passed_in_target=20, broken_in_target=3)
    report = replace(report, splits=(*others, replace(later, counts=counts)))
    screen = Console(width=140, color_system=None)
    with screen.capture() as capture:
        screen.print(table_of({"swarm": [report, report]}))
    shown = capture.get()
    assert "Means of 2 runs" in shown
    assert "54 passed, 20 of them in the target" in shown
    row = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["swarm"])
    assert row[3:8] == ["9.0", "4.0", "3.0", "0.6750", "0.7375"]
