"""Evaluates a model sample by sample, and compares results before and after a change.

In: sources, and an `Evaluator`: model, task, precision and ranks. Out: `SampleResults`, one row per sample, the same
table on every rank; `Flips` between two tables: kept, broken, repaired, failing.
"""

from lightning_nrl.evaluation.deployed_precision import DeployedPrecision
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_options import DOUBTFUL, Focal, SampleOptions
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, SampleResults

__all__ = [
    "DOUBTFUL",
    "DeployedPrecision",
    "Evaluator",
    "FlipCounts",
    "Flips",
    "Focal",
    "SampleOptions",
    "SampleResults",
]
