"""Repeats the paper's study in one call: runs many settings and seeds on one problem, and returns one table.

In: a model, its known data, settings and seeds. Out: a `SweepResult`, the table of all runs and their weights.
"""

from lightning_nrl.analysis.sweep.grid import Grid, Setting, Sweepable, parse_settings
from lightning_nrl.analysis.sweep.run_store import RUN_COLUMNS, Run
from lightning_nrl.analysis.sweep.run_sweep import Seeds, parse_seeds, swarming, sweep_module
from lightning_nrl.analysis.sweep.sweep_result import SweepResult

__all__ = [
    "RUN_COLUMNS",
    "Grid",
    "Run",
    "Seeds",
    "Setting",
    "SweepResult",
    "Sweepable",
    "parse_seeds",
    "parse_settings",
    "swarming",
    "sweep_module",
]
