"""Fits with a repair, for `test_distributed.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from digit_models import Classifier, Digits, quick_repair, state_of
from lightning_package import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler

from lightning_nrl import RegressionFreeRepair
from lightning_nrl.methods import Method, Problem, Solution

SIZES = (203, 3, 1)
"""203 samples are odd; of 3 samples one of two ranks has 1, of 1 sample none."""


class FewRepairs(Digits):
    """As many repair samples as asked for: also fewer than there are ranks."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, sampler=SubsetRandomSampler(range(101)))

    def repair_dataloader(self) -> DataLoader:
        return DataLoader(Subset(self.repair, range(self.n)), 64)


class Frozen(Classifier):
    """Takes no step, so that one process and two repair the same weights."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Predicting(Frozen):
    """Has a `predict_step` that gives other logits than `forward` on the second rank alone."""

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]) * (1 + self.global_rank)


class Leave(Callback):
    """Every rank writes down its weights and its report; to stand behind the repair."""

    def __init__(self, repair: RegressionFreeRepair) -> None:
        self.repair = repair

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        state = state_of(pl_module)
        left = {"state": state, "report": self.repair.report.to_json()}
        torch.save(left, Path(self.repair.dirpath) / f"rank{trainer.global_rank}.pt")


def trainer_on(
    folder: Path, strategy: Any, devices: int, *callbacks: Callback, train_batches: int = 1
) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        limit_train_batches=train_batches,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )


def fit(
    folder: Path, sizes: Sequence[int], strategy: Any = "auto", devices: int = 1
) -> tuple[Trainer, Classifier]:
    """Fits once for each number of repair samples; files go to a folder of that name."""
    callback = quick_repair(unseen="test", sample_id=1)
    trainer = trainer_on(folder, strategy, devices, callback, Leave(callback))
    for n in sizes:
        callback.dirpath = folder / str(n)
        model = Predicting()
        model.load_state_dict(
            torch.load(folder.parent / "trained.ckpt", weights_only=True)["state_dict"]
        )
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(model, datamodule=FewRepairs(n))
    return trainer, model


@dataclass(frozen=True)
class Continued(Method):
    """Proposes what training gives when it goes on, and leaves the rest to the gate; every rank may
    write it down.
    """

    folder: Path | None = None
    weighs: bool = False
    trains: ClassVar[bool] = True

    def __call__(self, problem: Problem) -> Solution:
        assert problem.training is not None
        with problem.clock.stage("fit"):
            trained = problem.training(
                seconds=problem.clock.left,
                seed=problem.seed,
                clock=problem.clock,
                weight=torch.where(problem.before.passed, 1.0, 3.0) if self.weighs else None,
            )
        if trained is None:
            return Solution(None, "no time.")
        if self.folder is not None:
            torch.save(dict(trained.state), self.folder / f"trained{problem.collective.rank}.pt")
        return Solution(problem.propose("fit", trained.state))


def continued(**arguments: Any) -> RegressionFreeRepair:
    defaults = {"method": Continued(), "gate": "accuracy", "verbose": False}
    return RegressionFreeRepair(**{**defaults, **arguments})


class Later(Classifier):
    """Takes no step under a trainer with a repair, so that one process and two go on from the same
    weights.
    """

    def configure_optimizers(self) -> Any:
        repairs = any(isinstance(c, RegressionFreeRepair) for c in self.trainer.callbacks)
        return torch.optim.SGD(self.parameters(), lr=0.0 if repairs else 0.5)


def fit_continued(folder: Path, strategy: Any = "auto", devices: int = 1) -> None:
    """Repairs by training three more epochs, each of one batch of all samples."""
    folder.mkdir(exist_ok=True)
    callback = continued(method=Continued(folder, weighs=True), dirpath=folder)
    trainer, data, model = (
        trainer_on(folder, strategy, devices, callback, Leave(callback)),
        FewRepairs(203),
        Later(),
    )
    trainer.fit_loop.max_epochs, data.batch_size = 3, 512
    model.load_state_dict(
        torch.load(folder.parent / "trained.ckpt", weights_only=True)["state_dict"]
    )
    trainer.fit(model, datamodule=data)


def fit_batch_norm(folder: Path) -> None:
    """A network whose running statistics are those of each rank's own batches."""
    callback = quick_repair(dirpath=folder / "batch_norm")
    trainer = trainer_on(folder, "ddp", 2, callback, Leave(callback), train_batches=2)
    trainer.fit(Classifier("cnn", lr=0.03), datamodule=FewRepairs(203))


def fit_all(folder: Path) -> None:
    """By a rank of two."""
    fit(folder, SIZES, "ddp", 2)
    fit_batch_norm(folder)
