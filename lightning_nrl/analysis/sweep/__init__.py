"""The paper's study as one call: many settings and seeds on one problem, one table. `sweep_module` runs them."""

from lightning_nrl.analysis.sweep.grid import Grid, Setting, Sweepable, parse_settings
from lightning_nrl.analysis.sweep.run import COLUMNS, Run
from lightning_nrl.analysis.sweep.sweep_module import Seeds, check_trials, parse_seeds, swarming, sweep_module
from lightning_nrl.analysis.sweep.sweep_progress import SweepObserver
from lightning_nrl.analysis.sweep.sweep_result import SweepResult
from lightning_nrl.analysis.sweep.trials import Trials, regression_free_repairs

__all__ = [
    "COLUMNS",
    "Grid",
    "Run",
    "Seeds",
    "Setting",
    "SweepObserver",
    "SweepResult",
    "Sweepable",
    "Trials",
    "check_trials",
    "parse_seeds",
    "parse_settings",
    "regression_free_repairs",
    "swarming",
    "sweep_module",
]
