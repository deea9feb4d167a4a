from lightning_nrl._trainer.reading.data_splits import DataOptions
from lightning_nrl.callbacks import (
    PositiveCongruentTraining,
    RegressionFreeRepair,
    RegressionMetrics,
    ReleaseGate,
    RepairInTraining,
    WeightInterpolation,
)
from lightning_nrl.data import Target, TensorSource
from lightning_nrl.entrypoints import compare, diagnose, repair
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation import SampleOptions
from lightning_nrl.gate import Gate
from lightning_nrl.pipeline import BoundOptions, SearchOptions, Settings, repair_module
from lightning_nrl.published import TrainingHistory
from lightning_nrl.release import RegressionSuite
from lightning_nrl.report import RepairReport
from lightning_nrl.search import ParticleSwarm
from lightning_nrl.study import Grid, sweep
from lightning_nrl.updates import OldModel

__version__: str

__all__ = [
    "BoundOptions",
    "ConfigurationError",
    "DataOptions",
    "Gate",
    "Grid",
    "OldModel",
    "ParticleSwarm",
    "PositiveCongruentTraining",
    "RegressionFreeRepair",
    "RegressionMetrics",
    "RegressionSuite",
    "ReleaseGate",
    "RepairInTraining",
    "RepairReport",
    "SampleOptions",
    "SearchOptions",
    "Settings",
    "Target",
    "TensorSource",
    "TrainingHistory",
    "WeightInterpolation",
    "compare",
    "diagnose",
    "repair",
    "repair_module",
    "sweep",
]
