"""Repeats the paper's study in one call: many settings and seeds on one problem, in one table.

In: a model, its known data, settings and seeds. Out: a `SweepResult`, the table of all runs and
their weights.
"""

from lightning_nrl.study.grid import Grid, Setting, Sweepable
from lightning_nrl.study.run_store import Run
from lightning_nrl.study.run_sweep import Seeds, sweep_module
from lightning_nrl.study.sweep import sweep
from lightning_nrl.study.sweep_result import SweepResult
from lightning_nrl.study.table_ii import TABLE_II, PaperRow, paper_arguments

__all__ = [
    "TABLE_II",
    "Grid",
    "PaperRow",
    "Run",
    "Seeds",
    "Setting",
    "SweepResult",
    "Sweepable",
    "paper_arguments",
    "sweep",
    "sweep_module",
]
