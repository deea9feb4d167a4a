"""Classes of `pytorch_lightning` and `lightning.pytorch`, two copies of one library.

One or both are installed. A name such as `Trainer` is the union of both classes, for annotations
and `isinstance`. A name such as `CallbackBase` is a class derived from both. `class_for` returns
the class to construct. mypy sees only classes of `pytorch_lightning`.
"""

from __future__ import annotations

import operator
import sys
from functools import reduce
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero
from lightning_utilities.core.rank_zero import (
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from torch import nn

FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
"""The Fabric package that belongs to each of the two packages."""
LOGGER_NAMES = tuple(name for pair in FABRIC.items() for name in pair)


def installed_packages() -> tuple[ModuleType, ...]:
    """Imports `lightning.pytorch` and `pytorch_lightning`, or the one that is installed."""
    is_imported = any(name in sys.modules for name in FABRIC)
    log = rank_zero.log
    category = rank_zero.rank_zero_deprecation_category
    packages = []
    for name in FABRIC:
        try:
            packages.append(import_module(name))
        except ImportError as error:
            cause = error
    if not packages:
        raise ImportError(
            "neither `lightning.pytorch` nor `pytorch_lightning` can be imported. "
            "HINT: python -m pip install lightning"
        ) from cause
    if is_imported:  # the user's package goes on to log with its own logger
        rank_zero.log = log
        rank_zero.rank_zero_deprecation_category = category
    return tuple(packages)


PACKAGES = installed_packages()


def classes(path: str) -> tuple[type, ...]:
    """Returns the class at a path such as `pytorch.callbacks.Timer` in each package that has it."""
    kinds = (_find(package.__name__, path) for package in PACKAGES)
    return tuple(kind for kind in kinds if kind is not None)


def _find(package: str, path: str) -> Any:
    root, *parts, name = path.split(".")
    root = FABRIC[package] if root == "fabric" else package
    return getattr(import_module(".".join([root, *parts])), name, None)


def callback_kinds(names: str) -> tuple[type, ...]:
    """Returns the callback classes with these names, separated by spaces, of all packages."""
    return tuple(kind for name in names.split() for kind in classes(f"pytorch.callbacks.{name}"))


def _union(path: str) -> Any:
    return reduce(operator.or_, classes(path))


def _base(path: str) -> Any:
    kinds = classes(path)
    return kinds[0] if len(kinds) == 1 else type(f"{kinds[0].__name__}Base", kinds, {})


if TYPE_CHECKING:
    from lightning_fabric.utilities.cloud_io import _load
    from lightning_fabric.utilities.distributed import (
        DistributedSamplerWrapper,
    )
    from pytorch_lightning import (
        Callback,
        LightningDataModule,
        LightningModule,
        Trainer,
    )
    from pytorch_lightning.callbacks import (
        Checkpoint,
        ModelCheckpoint,
        ModelPruning,
        ProgressBar,
        RichProgressBar,
        TQDMProgressBar,
    )
    from pytorch_lightning.loggers import (
        Logger,
        MLFlowLogger,
        TensorBoardLogger,
        WandbLogger,
    )
    from pytorch_lightning.loggers.logger import DummyLogger
    from pytorch_lightning.plugins.io import (
        AsyncCheckpointIO,
        CheckpointIO,
        TorchCheckpointIO,
    )
    from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO

    CallbackBase = Callback
    DummyLoggerBase = DummyLogger
    LightningModuleMixin = LightningModule
    WrappingCheckpointIO = _WrappingCheckpointIO
    WrappingCheckpointIOBase = _WrappingCheckpointIO
    load_checkpoint = _load
else:
    load_checkpoint = _find(PACKAGES[0].__name__, "fabric.utilities.cloud_io._load")
    DistributedSamplerWrapper = _union("fabric.utilities.distributed.DistributedSamplerWrapper")
    WrappingCheckpointIO = _union("pytorch.plugins.io.wrapper._WrappingCheckpointIO")
    for module, names in {
        "pytorch": "Callback LightningDataModule LightningModule Trainer",
        "pytorch.callbacks": (
            "Checkpoint ModelCheckpoint ModelPruning ProgressBar RichProgressBar TQDMProgressBar"
        ),
        "pytorch.loggers": "Logger MLFlowLogger TensorBoardLogger WandbLogger",
        "pytorch.plugins.io": "AsyncCheckpointIO CheckpointIO TorchCheckpointIO",
    }.items():
        globals().update({name: _union(f"{module}.{name}") for name in names.split()})
    CallbackBase = _base("pytorch.Callback")
    WrappingCheckpointIOBase = _base("pytorch.plugins.io.wrapper._WrappingCheckpointIO")
    DummyLoggerBase = _base("pytorch.loggers.logger.DummyLogger")
    # Subclasses of it also derive from a user's module, whose methods a base from the other package
    # would override.
    LightningModuleMixin = nn.Module


def packages_of(part: object) -> list[str]:
    """Returns the package names of a Trainer, module, data module, callback or logger, or none."""
    names = []
    for package in PACKAGES:
        modules = (package.LightningModule, package.LightningDataModule)
        if isinstance(part, (package.Trainer, *modules, package.Callback, package.loggers.Logger)):
            names.append(package.__name__)
    return names


def class_for(trainer: Trainer, path: str) -> Any:
    """Returns the class at a path (see `classes`) in the package of the trainer."""
    return _find(packages_of(trainer)[0], path)
