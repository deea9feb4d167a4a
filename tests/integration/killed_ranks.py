"""Repairs by a rank of two that ends itself in the middle, for `test_killed_ranks.py`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digit_models import QUICK, Classifier, Digits, quiet_trainer
from distributed_fit import Continued, Leave
from options import with_options

from lightning_nrl import ParticleSwarm, RegressionFreeRepair, repair
from lightning_nrl._utils.resume import ResumeStore
from lightning_nrl._utils.timing import StageTimer
from lightning_nrl.methods import Auto

SWARM = ParticleSwarm(particles=12, iterations=8)
METHODS = {
    "auto": Auto(SWARM),
    "continued": Continued(),
    "finetune-polish": "finetune-polish",
    "swarm": SWARM,
}


class Randomised(Classifier):
    """Trains by a schedule on augmented images, with statistics and dropout of each rank's own."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images = batch[0] + 0.1 * torch.randn_like(batch[0])
        return super().training_step((images, *batch[1:]), batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]


@dataclass(frozen=True)
class End:
    """Which ranks end, by which signal, at which of the moments that `on_moments` counts."""

    ranks: tuple[int, ...] = ()
    at: int = 0
    signum: int = signal.SIGKILL


def on_moments(tell: Callable[[], None]) -> None:
    """Has it called whenever a stage or a step that is saved begins, or progress is told."""

    def before(owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def told(*args: Any, **kwargs: Any) -> Any:
            tell()
            return own(*args, **kwargs)

        setattr(owner, name, told)

    for owner, name in ((StageTimer, "stage"), (StageTimer, "tell"), (ResumeStore, "once")):
        before(owner, name)


def repaired(folder: Path, trained: Path, method: str, end: End) -> None:
    """By a rank of two; leaves weights, report and how many moments there were."""
    rank, moments = int(os.environ["RANK"]), [0]

    def tell() -> None:
        moments[0] += 1
        if rank in end.ranks and moments[0] == end.at:
            os.kill(os.getpid(), end.signum)

    on_moments(tell)
    how = with_options({**QUICK, "method": METHODS[method], "gate": "accuracy", "save_every": 0})
    callback = RegressionFreeRepair(**how, dirpath=folder)
    trainer = quiet_trainer(folder, devices=2, strategy="ddp")
    repair(
        trainer,
        model := Randomised("cnn"),
        datamodule=Digits(),
        ckpt_path=trained,
        callback=callback,
    )
    Leave(callback).on_train_end(trainer, model)
    (folder / f"moments{rank}").write_text(str(moments[0]))
