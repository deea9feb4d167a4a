"""Evaluates a model sample by sample, and compares its results before and after a change.

In: data sources, and an `Evaluator` with a model and its task. Out: `SampleResults`, a table with
one row per sample; every rank gets the same table. `Flips` compares two tables: each sample is
kept, broken, repaired or failing.
"""

from lightning_nrl.evaluation.deployed_precision import DeployedPrecision
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.sample_options import DOUBTFUL, Focal, SampleOptions
from lightning_nrl.evaluation.sample_results import FlipCounts, Flips, GroupCounts, SampleResults

__all__ = [
    "DOUBTFUL",
    "DeployedPrecision",
    "Evaluator",
    "FlipCounts",
    "Flips",
    "Focal",
    "GroupCounts",
    "SampleOptions",
    "SampleResults",
]
