"""Repairs by each task, and with arguments that tell samples apart, for `test_distributed_repairs.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from digit_models import QUICK, Classifier, Digits, quiet_trainer
from distributed_fit import Leave
from lightning_package import LightningDataModule, LightningModule
from options import with_options
from task_models import CASES
from torch import Tensor

from lightning_nrl import ParticleSwarm, RegressionFreeRepair, SearchOptions, Target, repair
from lightning_nrl.localization import NeuRecoverLite
from lightning_nrl.methods import Auto, MergedRepairs, bundle

SWARM = ParticleSwarm(particles=12, iterations=8)
METHODS: dict[str, Any] = {
    "multilabel": SWARM,
    "regression": "linearized",
    "segmentation": "finetune-polish",
    "sequence": Auto(SWARM),
    "custom": SWARM,
}
"""A method for each task."""


def camera(batch: Any) -> list[str]:
    """The slice of each sample of `Digits`."""
    return ["noisy" if noisy else "clean" for noisy in batch[2].tolist()]


def worth(batch: Any) -> Tensor:
    """What each failure of `Digits` counts."""
    return 1 + 2 * batch[1]


HEEDED: dict[str, dict[str, Any]] = {
    "columns": {
        "method": "convex",
        "importance": worth,
        "slices": camera,
        "quotas": {"noisy": 5, "clean": "25%"},
        "protected": Target.label(0),
        "set_aside": "doubtful",
        "gate": "tolerance:3",
        "calibration": "val",
        "limit": "tolerance:1",
        "confidence": 0.9,
    },
    "ids": {
        "importance": "focal",
        "protected": {"train": [3, 4, 5], "val": [0, 1]},
        "set_aside": Target.label(8),
        "calibration": "val",
        "confidence": 0.8,
    },
    "merged": {
        "method": MergedRepairs("label", most=2, method=bundle("arachne", searcher=SWARM), searcher=SWARM),
        "risk": {(3, 5): 4, 8: 2},
    },
    "quota": {"slices": Target.label(8), "quotas": {"label_8": 1000}},
}
"""Arguments of a repair of `Digits` that tell its samples apart."""


def jobs() -> Iterator[tuple[str, Callable[[Path, int], None]]]:
    """Each repair by its name, to be made in a folder with so many processes; trained models lie beside the folder."""
    for name, case in CASES.items():
        how = {
            "task": case.task,
            "method": METHODS[name],
            "search": SearchOptions(localizer=NeuRecoverLite(n_weights=24)),
        }
        yield name, partial(_repaired, name, *case.make(), how)
    for name, arguments in HEEDED.items():
        yield name, partial(_repaired, name, Digits(), Classifier(), with_options({**QUICK, **arguments}))


def _repaired(
    name: str, data: LightningDataModule, model: LightningModule, how: dict[str, Any], folder: Path, devices: int
) -> None:
    callback = RegressionFreeRepair(**{"unseen": "test", "dirpath": folder / name, **how, "verbose": False})
    trainer = quiet_trainer(folder, devices=devices, strategy="ddp" if devices > 1 else "auto")
    repair(trainer, model, datamodule=data, ckpt_path=folder.parent / f"{name}.ckpt", callback=callback)
    Leave(callback).on_train_end(trainer, model)


def make_all(folder: Path) -> None:
    """All of them, by a rank of two."""
    for _, job in jobs():
        job(folder, 2)
