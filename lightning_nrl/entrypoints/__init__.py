"""Functions for a Trainer and a trained model: repair, diagnose, compare, sweep.

In: a Trainer, a LightningModule and its data. Out: a `RepairReport`, `Diagnosis`, `Comparison` or `SweepResult`.
"""

from lightning_nrl.entrypoints.functions import compare, diagnose, repair, sweep

__all__ = ["compare", "diagnose", "repair", "sweep"]
