"""Functions that take a Trainer and a trained model: repair, diagnose, compare, sweep. None of them trains.

In: a Trainer, a LightningModule and its data. Out: a `RepairReport`, `Diagnosis`, `Comparison` or `SweepResult`.
"""

from lightning_nrl.entrypoints.compare_call import compare
from lightning_nrl.entrypoints.diagnose_call import diagnose
from lightning_nrl.entrypoints.repair_call import repair
from lightning_nrl.entrypoints.sweep_call import sweep

__all__ = ["compare", "diagnose", "repair", "sweep"]
