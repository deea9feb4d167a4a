"""Writing a repair to loggers: numbers to any of them, and to those that can show it what else helps to judge it.

In: a report and the loggers of a trainer. Out: scalars, figures, pictures, text, tables, files, a row of
hyperparameters. A logger that fails costs nothing but a warning.
"""

from lightning_nrl._tracking.learning_curves import Learning
from lightning_nrl._tracking.loggers import declare, track, track_history, track_numbers, track_release
from lightning_nrl._tracking.repair_log import RepairLog
from lightning_nrl._tracking.scalars import outcome, release_numbers, search_curves, split_numbers, strength_curves
from lightning_nrl._tracking.sweep_hparams import sweep_rows, track_sweep

__all__ = [
    "Learning",
    "RepairLog",
    "declare",
    "outcome",
    "release_numbers",
    "search_curves",
    "split_numbers",
    "strength_curves",
    "sweep_rows",
    "track",
    "track_history",
    "track_numbers",
    "track_release",
    "track_sweep",
]
