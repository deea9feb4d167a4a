"""Functions for a Trainer and a trained model: repair, diagnose, compare.

In: a Trainer, a LightningModule and its data. Out: a `RepairReport`, `Diagnosis` or `Comparison`.
"""

from lightning_nrl.entrypoints.functions import compare, diagnose, repair

__all__ = ["compare", "diagnose", "repair"]
