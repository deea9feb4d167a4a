"""Classes of `pytorch_lightning` and `lightning.pytorch`, two copies of one library; one or both
are
installed.

A name such as `Trainer` is the union of both classes, for annotations and `isinstance`. A name such
as `CallbackBase` is a class derived from both. `class_for` returns the class to construct. mypy
sees only classes of `pytorch_lightning`.
"""

from __future__ import annotations

import operator
import sys
from functools import reduce
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import rank_zero
from lightning_utilities.core.rank_zero import rank_zero_info as rank_zero_info
from lightning_utilities.core.rank_zero import rank_zero_only as rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_warn as rank_zero_warn
from torch import nn

FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
"""The Fabric package that belongs to each of the two packages."""
LOGGER_NAMES = tuple(name for pair in FABRIC.items() for name in pair)


def installed_packages() -> tuple[ModuleType, ...]:
    """Imports and returns `lightning.pytorch` and `pytorch_lightning`, or the only one that is
    installed.
    """
    imported = [name for name in FABRIC if name in sys.modules]
    kept = rank_zero.log, rank_zero.rank_zero_deprecation_category
    packages, errors = [], []
    for name in FABRIC:
        try:
            packages.append(import_module(name))
        except ImportError as error:
            errors.append(error)
    if not packages:
        hint = "HINT: python -m pip install lightning"
        raise ImportError(
            f"neither `lightning.pytorch` nor `pytorch_lightning` can be imported. {hint}"
        ) from errors[0]
    if imported:  # the user's package goes on to log with its own logger
        rank_zero.log, rank_zero.rank_zero_deprecation_category = kept
    return tuple(packages)


PACKAGES = installed_packages()


def classes(path: str) -> tuple[type[Any], ...]:
    """Returns the classes at a path such as `pytorch.callbacks.Timer`, one from each package that
    has such a class.
    """
    found = (_find(package.__name__, path) for package in PACKAGES)
    return tuple(kind for kind in found if kind is not None)


def _find(package: str, path: str) -> Any:
    (part, *inside), name = path.split(".")[:-1], path.rsplit(".", 1)[1]
    root = FABRIC[package] if part == "fabric" else package
    return getattr(import_module(".".join([root, *inside])), name, None)


def callback_kinds(names: str) -> tuple[type[Any], ...]:
    """Returns the callback classes with these names, separated by spaces, of all installed packages
    that have them.
    """
    return tuple(kind for name in names.split() for kind in classes(f"pytorch.callbacks.{name}"))


def _union(path: str) -> Any:
    return reduce(operator.or_, classes(path))


def _base(path: str) -> Any:
    kinds = classes(path)
    return kinds[0] if len(kinds) == 1 else type(f"{kinds[0].__name__}Base", kinds, {})


if TYPE_CHECKING:
    from lightning_fabric.utilities.cloud_io import _load
    from lightning_fabric.utilities.distributed import (
        DistributedSamplerWrapper as DistributedSamplerWrapper,
    )
    from pytorch_lightning import Callback as Callback
    from pytorch_lightning import LightningDataModule as LightningDataModule
    from pytorch_lightning import LightningModule as LightningModule
    from pytorch_lightning import Trainer as Trainer
    from pytorch_lightning.callbacks import Checkpoint as Checkpoint
    from pytorch_lightning.callbacks import ModelCheckpoint as ModelCheckpoint
    from pytorch_lightning.callbacks import ModelPruning as ModelPruning
    from pytorch_lightning.callbacks import ProgressBar as ProgressBar
    from pytorch_lightning.callbacks import RichProgressBar as RichProgressBar
    from pytorch_lightning.callbacks import TQDMProgressBar as TQDMProgressBar
    from pytorch_lightning.loggers import Logger as Logger
    from pytorch_lightning.loggers import MLFlowLogger as MLFlowLogger
    from pytorch_lightning.loggers import TensorBoardLogger as TensorBoardLogger
    from pytorch_lightning.loggers import WandbLogger as WandbLogger
    from pytorch_lightning.loggers.logger import DummyLogger
    from pytorch_lightning.plugins.io import CheckpointIO as CheckpointIO
    from pytorch_lightning.plugins.io import TorchCheckpointIO as TorchCheckpointIO
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
        "pytorch.callbacks": "Checkpoint ModelCheckpoint ModelPruning ProgressBar RichProgressBar TQDMProgressBar",
        "pytorch.loggers": "Logger MLFlowLogger TensorBoardLogger WandbLogger",
        "pytorch.plugins.io": "CheckpointIO TorchCheckpointIO",
    }.items():
        globals().update({name: _union(f"{module}.{name}") for name in names.split()})
    CallbackBase = _base("pytorch.Callback")
    WrappingCheckpointIOBase = _base("pytorch.plugins.io.wrapper._WrappingCheckpointIO")
    DummyLoggerBase = _base("pytorch.loggers.logger.DummyLogger")
    # Subclasses of it also derive from a user's module, whose methods a base from the other package
    # would override.
    LightningModuleMixin = nn.Module


def packages_of(thing: object) -> list[str]:
    """Returns the package names of a Trainer, module, data module, callback or logger. Other
    objects have none.
    """

    def kinds(package: Any) -> tuple[type[Any], ...]:
        modules = (package.LightningModule, package.LightningDataModule)
        return (package.Trainer, *modules, package.Callback, package.loggers.Logger)

    return [package.__name__ for package in PACKAGES if isinstance(thing, kinds(package))]


def class_for(trainer: Trainer, path: str) -> Any:
    """Returns the class at a path (see `classes`) in the package of the trainer."""
    return _find(packages_of(trainer)[0], path)
