"""One network with one seed: trained, then repaired, fine-tuned or trained again, and counted by a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from default_fits import Fit
from default_problems import SPLITS, Case
from default_records import Run, Seconds, now, since
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lightning_nrl import RegressionFreeRepair, RepairReport, Settings, Target, TensorSource, repair_module

State = dict[str, Tensor]


class TrainingEnd(Callback):
    """Notes weights and time when training ends; what comes after it in the same `fit` is the repair."""

    def __init__(self) -> None:
        self.state: State = {}
        self.began = self.ended = Seconds(0.0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = deepcopy(pl_module.state_dict())
        self.ended = now()


class Work:
    """The runs of one case with one seed, in a folder of their own.

    Args:
        name: of the problem.
        case: its data, network and training.
        seed: of all.
        folder: of the files.
    """

    def __init__(self, name: str, case: Case, seed: int, folder: Path) -> None:
        self.name, self.case, self.seed, self.folder = name, case, seed, folder
        self.data: LightningDataModule = case.data(seed)

    def trained(self) -> tuple[State, Seconds]:
        """The weights that the training gives, and its seconds; trained if they are not there yet."""
        path = self.folder / "trained.pt"
        if not path.exists():
            model = self.new()
            seconds = self.fit(model, datamodule=self.data)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state": model.state_dict(), "seconds": asdict(seconds)}, path)
        saved = torch.load(path, weights_only=True)
        return saved["state"], Seconds(**saved["seconds"])

    def new(self, state: State | None = None) -> LightningModule:
        """A new network, with weights if they are given."""
        seed_everything(self.seed, verbose=False)
        model = self.case.network()
        if state is not None:
            model.load_state_dict(state)
        return model

    def fit(
        self, model: LightningModule, *callbacks: Callback, epochs: int | None = None, **batches: object
    ) -> Seconds:
        """A fit as its owner starts it, and how long it took."""
        began = now()
        trainer = Trainer(
            max_epochs=self.case.epochs if epochs is None else epochs,
            accelerator="cpu",
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, **batches)
        return since(began)

    def everything(self) -> DataLoader:
        """Batches of training and repair data together, as large as those of the training."""
        loader = self.data.train_dataloader()
        known = ConcatDataset([loader.dataset, self.data.data["repair"]])
        return DataLoader(known, loader.batch_size, shuffle=True, drop_last=loader.drop_last)

    def fine_tuned(self) -> Run:
        """On all known data from the trained weights, with as many epochs and the module's own optimizer."""
        state, fit = self.trained()
        model = self.new(state)
        return self.counted("fine-tuning", state, model, self.fit(model, train_dataloaders=self.everything()), fit)

    def retrained(self) -> Run:
        """On all known data from scratch."""
        state, fit = self.trained()
        model = self.new()
        return self.counted("retraining", state, model, self.fit(model, train_dataloaders=self.everything()), fit)

    def repaired(
        self,
        method: str = "default",
        max_time: float | None = None,
        network: Callable[[], LightningModule] | None = None,
        epochs: int | None = None,
    ) -> Run:
        """The default repair, as a callback of the training, or of another fit from the trained weights on."""
        state, fit = self.trained()
        model = self.new()
        if network is not None:
            model = network()
            model.load_state_dict(state)
        end = TrainingEnd()
        repair = RegressionFreeRepair(
            self.target(),
            unseen="test",
            max_time=max_time,
            seed=self.seed,
            dirpath=self.folder / file_name(method),
            verbose=False,
        )
        self.fit(model, end, repair, epochs=epochs, datamodule=self.data)
        seconds = since(end.ended)
        if network is None:
            fit = Seconds(end.ended.wall - end.began.wall, end.ended.processor - end.began.processor)
        same = all(torch.equal(value, state[name]) for name, value in end.state.items())
        return self.counted(method, end.state, model, seconds, fit, repair.report, same)

    def repaired_plain(self, method: str, max_time: float | None) -> Run:
        """The default repair of the trained network from tensors, without Lightning's trainer."""
        state, fit = self.trained()
        model = self.new(state).eval()
        train, repair, test = map(self.source, SPLITS)
        settings = Settings(target=self.target(), max_time=max_time, seed=self.seed)
        began = now()
        outcome = repair_module(model, [train, repair], settings, unseen=[test])
        outcome.write(model)
        return self.counted(method, state, model, since(began), fit, outcome.report)

    def target(self) -> Target:
        return Target.all() if self.case.in_target is None else Target.where(self.case.in_target)

    def source(self, split: str) -> TensorSource:
        inputs, labels, *extras = self.data.data[split].tensors
        roles = {"passed": split == "train", "failed": split == "repair"}
        return TensorSource(inputs, labels, split=split, extras=tuple(extras), **roles)

    def counted(
        self,
        method: str,
        before: State,
        model: LightningModule,
        seconds: Seconds,
        fit: Seconds,
        report: RepairReport | None = None,
        same_start: bool = True,
    ) -> Run:
        """What changed from weights before to a model as it is now."""
        old = self.new(before)
        was, now_right = ({split: right(m, self.data.data[split]) for split in SPLITS} for m in (old, model))
        targets = ~was["repair"]
        if self.case.in_target is not None:
            targets &= self.case.in_target(self.data.data["repair"].tensors)
        broken = {split: int((was[split] & ~now_right[split]).sum()) for split in SPLITS}
        return Run(
            self.name,
            self.seed,
            method,
            "" if report is None else report.status,
            targeted=int(targets.sum()),
            repaired=int((targets & now_right["repair"]).sum()),
            known_broken=broken["train"] + broken["repair"],
            unseen_repaired=int((~was["test"] & now_right["test"]).sum()),
            unseen_broken=broken["test"],
            unseen=len(was["test"]),
            train_accuracy=share(was["train"]),
            accuracy_before=share(was["test"]),
            accuracy_after=share(now_right["test"]),
            seconds=seconds,
            fit=fit,
            same_start=same_start,
            held_out=None if report is None else held_out_estimate(report),
        )


def held_out_estimate(report: RepairReport) -> tuple[int, int, int, int] | None:
    """Repaired of so many failures and broken of so many passed samples that were held out; None: there were none."""
    taken = next((rung for rung in report.rungs if rung.taken), None)
    if taken is None or taken.held_out is None:
        return None
    counts = taken.held_out
    return counts.repaired, counts.repaired + counts.failing, counts.broken, counts.passed


def methods_of(work: Work) -> dict[str, Callable[[], Run]]:
    """What a problem's default repair is compared with, and the repair."""
    return {"fine-tuning": work.fine_tuned, "retraining": work.retrained, "default": work.repaired}


def timed_methods(work: Work, shares: tuple[float, ...]) -> dict[str, Callable[[], Run]]:
    """The default repair in shares of the seconds of the fit."""

    def limited(method: str, share: float) -> Run:
        return work.repaired(method, share * work.trained()[1].wall)

    names = {f"{share:g} x the fit": share for share in shares}
    return {name: partial(limited, name, share) for name, share in names.items()}


def repaired_after(name: str, fit: Fit, work: Work, owner: Work) -> Run:
    """The default repair after a fit; a limited one has the seconds of the owner's training."""
    max_time = owner.trained()[1].wall if fit.is_limited else None
    if fit.is_plain:
        return work.repaired_plain(name, max_time)
    return work.repaired(name, max_time, fit.network, fit.epochs if fit.network else None)


@torch.no_grad()
def right(model: LightningModule, data: Dataset) -> Tensor:
    """Which samples a model gets right, in the order of the data."""
    model.eval()
    found = []
    for inputs, labels, *_ in DataLoader(data, 500):
        found.append(model(inputs).argmax(1) == labels)
    return torch.cat(found)


def share(passed: Tensor) -> float:
    return float(passed.double().mean())


def file_name(words: str) -> str:
    return words.replace(",", "").replace(" ", "_")
