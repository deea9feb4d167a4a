"""Regression-free repair of trained classifiers, as a PyTorch Lightning callback.

The names that most users need can be imported from here. Other public names are imported from their
packages, such as `lightning_nrl.methods.Convex` or `lightning_nrl.tasks.Segmentation`;
docs/reference lists them all. A package whose name begins with an underscore is private.
"""

from importlib import import_module
from importlib.util import find_spec

__version__ = "0.2.0.dev0"

# TensorBoard imports this package for its tab, without torch. So each name, and torch with it, is
# imported on first access only. Type checkers read `__init__.pyi`.
_PACKAGES = {
    "_trainer.reading.data_splits": "DataOptions",
    "callbacks": "PositiveCongruentTraining RegressionFreeRepair RegressionMetrics ReleaseGate "
    "RepairInTraining WeightInterpolation",
    "data": "Target TensorSource",
    "entrypoints": "compare diagnose repair",
    "errors": "ConfigurationError",
    "evaluation": "SampleOptions",
    "gate": "Gate",
    "pipeline": "BoundOptions SearchOptions Settings repair_module",
    "published": "TrainingHistory",
    "release": "RegressionSuite",
    "report": "RepairReport",
    "search": "ParticleSwarm",
    "study": "Grid sweep",
    "updates": "OldModel",
}
_HOMES = {name: package for package, names in _PACKAGES.items() for name in names.split()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name.startswith("__") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        value = import_module(f"{__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
