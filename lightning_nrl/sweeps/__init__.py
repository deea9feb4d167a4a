"""The paper's study as one call: many settings and seeds on one problem, one table. `sweep_module` runs them."""

from lightning_nrl.sweeps.grid import Grid, Setting, Sweepable, parse_settings
from lightning_nrl.sweeps.result import SweepResult
from lightning_nrl.sweeps.run import COLUMNS, Run
from lightning_nrl.sweeps.study import Seeds, SweepObserver, parse_seeds, swarming, sweep_module

__all__ = [
    "COLUMNS",
    "Grid",
    "Run",
    "Seeds",
    "Setting",
    "SweepObserver",
    "SweepResult",
    "Sweepable",
    "parse_seeds",
    "parse_settings",
    "swarming",
    "sweep_module",
]
