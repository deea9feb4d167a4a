"""Results of a model on each sample, and how they change.

In: sources, and an `Evaluator`: the model, the task that judges it, its precision and the ranks. Out: `SampleResults`,
one row a sample, the same table on every rank; between two of them `Flips`: kept, broken, repaired, failing. Weights
of samples and quotas of slices are columns of that table.
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
