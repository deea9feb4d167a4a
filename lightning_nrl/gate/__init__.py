"""The gate: whether a repair may be kept, by what became of all known samples.

In: what the model does before and after. Out: a `Verdict`, accepted or not, with the reason.
"""

from lightning_nrl.gate.acceptance import Accuracy, Gate, Instance, Tolerance, Verdict, judge, spared

__all__ = ["Accuracy", "Gate", "Instance", "Tolerance", "Verdict", "judge", "spared"]
