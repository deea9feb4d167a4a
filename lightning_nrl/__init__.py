"""Regression-free repair of trained classifiers, as a PyTorch Lightning callback."""

from lightning_nrl.bounds import Bound, check_mix, slice_bounds, weighted_bound
from lightning_nrl.comparison import Comparison, compare_module
from lightning_nrl.diagnosis import Diagnosis, diagnose_module
from lightning_nrl.errors import ConfigurationError, EvidenceError, RepairError
from lightning_nrl.fitness import Fitness
from lightning_nrl.gate import Gate, release
from lightning_nrl.localization import Everything, NeuRecoverLite
from lightning_nrl.methods import Constrained, Convex, Linearised, Polish, Strongest
from lightning_nrl.pipeline import Outcome, repair_module
from lightning_nrl.report import RepairReport
from lightning_nrl.search import ParticleSwarm
from lightning_nrl.settings import Settings
from lightning_nrl.shell.callback import RegressionFreeRepair
from lightning_nrl.shell.comparing import compare
from lightning_nrl.shell.congruent import PositiveCongruentTraining, regression_loss
from lightning_nrl.shell.interpolating import WeightInterpolation
from lightning_nrl.shell.monitoring import RegressionMetrics
from lightning_nrl.shell.preflight import diagnose
from lightning_nrl.shell.releasing import ReleaseGate
from lightning_nrl.shell.standalone import repair
from lightning_nrl.shell.sweeping import sweep
from lightning_nrl.sweeps import Grid, SweepResult, sweep_module
from lightning_nrl.switch import MarginSwitch, SwitchedModule, WeightedEnsemble, choose_threshold, choose_weight
from lightning_nrl.targets import Target
from lightning_nrl.tasks import Custom, Multiclass, Multilabel, Regression, Segmentation, Sequence, Task
from lightning_nrl.tensors import TensorSource
from lightning_nrl.updates.interpolation import choose_share, interpolate
from lightning_nrl.updates.oversampling import Oversampler
from lightning_nrl.updates.predictions import Predictions
from lightning_nrl.updates.reference import OldModel
from lightning_nrl.updates.terms import FocalDistillation, MarginHinge

__all__ = [
    "Bound",
    "Comparison",
    "ConfigurationError",
    "Constrained",
    "Convex",
    "Custom",
    "Diagnosis",
    "Everything",
    "EvidenceError",
    "Fitness",
    "FocalDistillation",
    "Gate",
    "Grid",
    "Linearised",
    "MarginHinge",
    "MarginSwitch",
    "Multiclass",
    "Multilabel",
    "NeuRecoverLite",
    "OldModel",
    "Outcome",
    "Oversampler",
    "ParticleSwarm",
    "Polish",
    "PositiveCongruentTraining",
    "Predictions",
    "Regression",
    "RegressionFreeRepair",
    "RegressionMetrics",
    "ReleaseGate",
    "RepairError",
    "RepairReport",
    "Segmentation",
    "Sequence",
    "Settings",
    "Strongest",
    "SweepResult",
    "SwitchedModule",
    "Target",
    "Task",
    "TensorSource",
    "WeightInterpolation",
    "WeightedEnsemble",
    "check_mix",
    "choose_share",
    "choose_threshold",
    "choose_weight",
    "compare",
    "compare_module",
    "diagnose",
    "diagnose_module",
    "interpolate",
    "regression_loss",
    "release",
    "repair",
    "repair_module",
    "slice_bounds",
    "sweep",
    "sweep_module",
    "weighted_bound",
]
