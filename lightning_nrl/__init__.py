"""Regression-free repair of trained classifiers, as a PyTorch Lightning callback."""

from lightning_nrl._trainer.data_options import DataOptions
from lightning_nrl.analysis.comparison import Comparison, compare_module
from lightning_nrl.analysis.diagnosis import Diagnosis, diagnose_module
from lightning_nrl.analysis.sweep import Grid, SweepResult, sweep_module
from lightning_nrl.callback import RegressionFreeRepair
from lightning_nrl.callbacks.congruent_training import PositiveCongruentTraining, regression_loss
from lightning_nrl.callbacks.regression_metrics import RegressionMetrics
from lightning_nrl.callbacks.release_gate import ReleaseGate
from lightning_nrl.callbacks.weight_interpolation import WeightInterpolation
from lightning_nrl.data.targets import Target
from lightning_nrl.data.tensor_source import TensorSource
from lightning_nrl.entrypoints.compare import compare
from lightning_nrl.entrypoints.diagnose import diagnose
from lightning_nrl.entrypoints.repair import repair
from lightning_nrl.entrypoints.sweep import sweep
from lightning_nrl.errors import ConfigurationError, EvaluationError, RepairError
from lightning_nrl.evaluation import SampleOptions
from lightning_nrl.gate import Gate
from lightning_nrl.localization import AllWeights, NeuRecoverLite
from lightning_nrl.methods import Auto, Convex, FineTunePolish, Linearized, Polish
from lightning_nrl.pipeline.options import BoundOptions, SearchOptions
from lightning_nrl.pipeline.repair_module import Outcome, repair_module
from lightning_nrl.pipeline.settings import Settings
from lightning_nrl.reference.interpolation import choose_share, interpolate
from lightning_nrl.reference.loss_terms import FocalDistillation, MarginHinge
from lightning_nrl.reference.old_model import OldModel
from lightning_nrl.reference.oversampling import Oversampler
from lightning_nrl.reference.predictions import Predictions
from lightning_nrl.report import RepairReport
from lightning_nrl.search import ParticleSwarm
from lightning_nrl.search.fitness import Fitness
from lightning_nrl.serving import MarginSwitch, SwitchedModule, WeightedEnsemble, choose_threshold, choose_weight
from lightning_nrl.stats import Bound, check_mix, slice_bounds, weighted_bound
from lightning_nrl.tasks import Custom, Multiclass, Multilabel, Regression, Segmentation, Sequence, Task

__all__ = [
    "AllWeights",
    "Auto",
    "Bound",
    "BoundOptions",
    "Comparison",
    "ConfigurationError",
    "Convex",
    "Custom",
    "DataOptions",
    "Diagnosis",
    "EvaluationError",
    "FineTunePolish",
    "Fitness",
    "FocalDistillation",
    "Gate",
    "Grid",
    "Linearized",
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
    "SampleOptions",
    "SearchOptions",
    "Segmentation",
    "Sequence",
    "Settings",
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
    "repair",
    "repair_module",
    "slice_bounds",
    "sweep",
    "sweep_module",
    "weighted_bound",
]
