"""Rows of docs/combinations.md: works is counted again, refused is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import (
    Classifier,
    Digits,
    Few,
    Manual,
    Scheduled,
    overwriting,
    quick_repair,
    quiet_trainer,
    right,
    since_2_6,
)
from lightning_package import EarlyStopping, LearningRateFinder, ModelCheckpoint, Trainer, callbacks
from repository import ROOT
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nrl import DataOptions, ParticleSwarm, RegressionFreeRepair, Target
from lightning_nrl.errors import ConfigurationError, NotRepairedWarning

TABLES = (ROOT / "docs" / "combinations.md").read_text(encoding="utf-8")
VERDICTS = dict(
    re.findall(r"^\| ([^|]+) \| (works|refused|not repaired) \| [^|]+\|$", TABLES, re.MULTILINE)
)


class TwoValidationLoaders(Few):
    repair_dataloader = None

    def val_dataloader(self) -> list[DataLoader]:
        return [DataLoader(self.val, 64), DataLoader(self.repair, 64)]


class Averaging(Classifier):
    def on_train_end(self) -> None:
        with torch.no_grad():
            self.network[-1].weight.mul_(0.9)


class OfTwoLoaders(Classifier):
    def validation_step(
        self, batch: tuple[Tensor, ...], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        pass


class Thawing(callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module: Classifier) -> None:
        self.freeze(pl_module.network[1])

    def finetune_function(self, pl_module: Classifier, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network[1], optimizer)


def quickest(**arguments: Any) -> RegressionFreeRepair:
    return quick_repair(method=ParticleSwarm(20, 20), unseen="test", **arguments)


@dataclass(frozen=True)
class Row:
    """What a fit is made of; `before` and `after` make the callbacks around the repair."""

    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    repair: dict[str, Any] = field(default_factory=dict)
    model: type[Classifier] = Classifier
    data: Callable[[], Digits] = Few
    resumed: bool = False


SWA, PRUNING = (
    partial(overwriting, name) for name in ("StochasticWeightAveraging", "ModelPruning")
)
LIMITS = {"limit_train_batches": 2, "limit_val_batches": 1}
ROWS = {
    "`EarlyStopping`": Row(lambda: EarlyStopping("val_loss")),
    "`ModelCheckpoint`": Row(lambda: ModelCheckpoint(monitor="val_loss")),
    '`ModelCheckpoint` and `start_from="best"`': Row(
        lambda: ModelCheckpoint(monitor="val_loss"), repair={"data": DataOptions(start_from="best")}
    ),
    "`StochasticWeightAveraging` before the repair": Row(SWA),
    "`StochasticWeightAveraging` after the repair": Row(after=SWA),
    "`on_train_end` of the module": Row(model=Averaging),
    "`EMAWeightAveraging` before the repair": Row(lambda: callbacks.EMAWeightAveraging()),
    "`EMAWeightAveraging` after the repair": Row(after=lambda: callbacks.EMAWeightAveraging()),
    "`ModelPruning` before the repair": Row(PRUNING),
    "`ModelPruning` after the repair": Row(after=PRUNING),
    "`BaseFinetuning`": Row(Thawing),
    "`LearningRateFinder`": Row(lambda: LearningRateFinder(num_training_steps=3)),
    "two repairs, one target each": Row(partial(quickest, target=Target.label(3))),
    "two repairs of one target and layer": Row(quickest),
    "a learning rate scheduler": Row(model=Scheduled),
    "manual optimization": Row(model=Manual),
    "`accumulate_grad_batches`, `gradient_clip_val`": Row(
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    ),
    "`fit(ckpt_path=...)` of an unfinished training": Row(resumed=True),
    "`fit(ckpt_path=...)` of a complete training": Row(resumed=True, trainer={"max_epochs": 1}),
    '`precision="bf16-mixed"`': Row(trainer={"precision": "bf16-mixed"}),
    '`precision="bf16-true"`': Row(
        trainer={"precision": "bf16-true"}, data=partial(Few, dtype=torch.bfloat16)
    ),
    "`limit_train_batches`, `limit_val_batches`": Row(trainer=LIMITS),
    "`overfit_batches`": Row(trainer={"overfit_batches": 2}),
    "`fast_dev_run`": Row(trainer={"fast_dev_run": 2}),
    "several validation loaders": Row(
        model=OfTwoLoaders, data=TwoValidationLoaders, repair={"data": DataOptions(failed="val:1")}
    ),
    "`reload_dataloaders_every_n_epochs`": Row(trainer={"reload_dataloaders_every_n_epochs": 1}),
    "`barebones=True`": Row(trainer={"barebones": True}),
    "`enable_checkpointing=False`": Row(trainer={"enable_checkpointing": False}),
}
ELSEWHERE = {
    "`torch.compile(model)`": ("trainer/test_continue_training.py", "fit(torch.compile(Net()"),
    "`ddp`, also in several processes": ("integration/test_distributed.py", "in_two_processes"),
    "`limit_test_batches`; `limit_val_batches` in `validate`": (
        "integration/test_release_gate.py",
        "limit_test_batches",
    ),
    "an `IterableDataset`": ("integration/test_streams.py", "IterableDataset"),
    "FSDP, DeepSpeed, model parallel": ("integration/test_refusals.py", "shards the weights"),
}
"""Rows that other tests hold: the file, and what stands in it."""


def trainer_of(row: Row, folder: Path, *given: Any) -> Trainer:
    if row.trainer.get("barebones"):
        quiet = {"accelerator": "cpu", "devices": 1, "max_epochs": 2}
        return Trainer(default_root_dir=folder, callbacks=list(given), **quiet, **row.trainer)
    return quiet_trainer(
        folder, *given, **{"max_epochs": 2, "num_sanity_val_steps": 0, **row.trainer}
    )


def test_the_rows_are_those_of_the_page():
    assert VERDICTS.keys() == {*ROWS, *ELSEWHERE}
    for path, text in ELSEWHERE.values():
        assert text in (ROOT / "tests" / path).read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[since_2_6] if "EMA" in n else []) for n in ROWS]
)
def test_a_row_does_what_the_page_says(tmp_path, name):
    row, repair, ckpt_path = ROWS[name], quickest(**ROWS[name].repair), None
    if row.resumed:
        first = quiet_trainer(tmp_path / "first", max_epochs=1)
        first.fit(Classifier(), datamodule=Few())
        first.save_checkpoint(ckpt_path := tmp_path / "first.ckpt", weights_only=False)
    given = [*([row.before()] if row.before else []), repair, *([row.after()] if row.after else [])]
    trainer, model, data = trainer_of(row, tmp_path, *given), row.model(), row.data()
    fit = partial(trainer.fit, model, datamodule=data, ckpt_path=ckpt_path)
    if VERDICTS[name] == "refused":
        with pytest.raises(ConfigurationError, match="HINT"):
            fit()
    elif VERDICTS[name] == "not repaired":
        with pytest.warns(NotRepairedWarning):
            fit()
        assert repair.report is None
    else:
        fit()
        assert repair.report.status == "repaired"
        *known, unseen = repair.report.splits
        assert sum(split.broken for split in known) == 0
        with trainer.precision_plugin.forward_context():
            found = right(model, data.test)
        assert unseen.n == len(found)
        assert unseen.kept + unseen.repaired == int(found.sum())
        assert (tmp_path / "repair" / "repaired.ckpt").exists() == (name != "`fast_dev_run`")
