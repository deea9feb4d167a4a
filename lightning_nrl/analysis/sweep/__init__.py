"""The paper's study as one call: many settings and seeds on one problem, one table.

In: a module, its data, settings (`Grid`) and seeds. Out: a `SweepResult`: what each run does, and the weights of each.
`sweep_module` runs them, many swarms at a time (`batch_search`), and counts them (`recount`).
"""

from lightning_nrl.analysis.sweep.grid import Grid, Setting, Sweepable, parse_settings
from lightning_nrl.analysis.sweep.run_store import RUN_COLUMNS, Run
from lightning_nrl.analysis.sweep.run_sweep import (
    Seeds,
    SweepObserver,
    check_trials,
    parse_seeds,
    swarming,
    sweep_module,
)
from lightning_nrl.analysis.sweep.sweep_result import SweepResult
from lightning_nrl.analysis.sweep.trials import Trials, regression_free_repairs

__all__ = [
    "RUN_COLUMNS",
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
