"""Evaluations of a model whose weights `fully_shard` splits over two ranks, each with a part of
every layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from digit_models import Classifier, Digits, digit, quick_repair, quiet_trainer, state_of
from lightning_package import Callback, Trainer, pl
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, Subset
from two_processes import in_two_processes

from lightning_nrl import ConfigurationError, RegressionMetrics, ReleaseGate
from lightning_nrl.errors import OtherRankError
from lightning_nrl.release import ReleaseReport
from lightning_nrl.updates import Predictions


class Sharded(Classifier):
    """Shards itself under a strategy of two ranks."""

    def configure_model(self) -> None:
        if self.trainer.world_size > 1:
            mesh = self.device_mesh["data_parallel"]
            for part in (self.network[1], self):
                fully_shard(part, mesh=mesh)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Fails inside the model on a whole batch, so that its inputs are tried next."""
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)  # gloo does not average gradients


class Odd(Digits):
    """193 samples: seven batches on the first rank, six on the second."""

    def test_dataloader(self) -> DataLoader:
        return DataLoader(Subset(self.repair, range(193)), 16)

    val_dataloader = test_dataloader


class Torn(Dataset):
    """The second rank cannot read the last batch."""

    def __len__(self) -> int:
        return 193

    def __getitem__(self, i: int) -> Any:
        if i > 180 and torch.distributed.get_rank():
            raise OSError("no such image")
        return torch.zeros(1, 8, 8), 0, False


def trainer_on(devices: int, folder: Path, *callbacks: Callback, split: int = 1) -> Trainer:
    strategy = "auto"
    if devices == 2:
        strategy = pl.strategies.ModelParallelStrategy(devices // split, split)
    return quiet_trainer(
        folder,
        *callbacks,
        strategy=strategy,
        devices=devices,
        max_epochs=1,
        limit_train_batches=2,
        enable_checkpointing=False,
    )


def new_model(folder: Path) -> Sharded:
    model = Sharded()
    model.load_state_dict(torch.load(folder / "trained.ckpt", weights_only=True)["state_dict"])
    with torch.no_grad():
        model.network[3].weight.mul_(torch.linspace(0.5, 1.5, 10)[:, None])
    return model


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }


def judged(folder: Path, reference: str, devices: int) -> ReleaseReport:
    model = new_model(folder)
    before = state_of(model)
    name = f"{Path(reference).suffix[1:]}{devices}"
    gate = ReleaseGate(
        folder / reference,
        ["accuracy", "nfr:10%", "slices"],
        slices=digit,
        verbose=False,
        dirpath=folder / name,
    )
    trainer_on(devices, folder, gate).test(model, datamodule=Odd(), verbose=False)
    after = whole_state(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    return gate.report


def counted(folder: Path, devices: int) -> list[dict[str, float]]:
    """Metrics of a validation, of a fit, and of loaders of one's own in another fit."""
    numbers = []
    for run, loaders in (("validate", None), ("fit", None), ("fit", Odd().test_dataloader())):
        metrics = RegressionMetrics(
            folder / "trained.ckpt", loaders=None if loaders is None else {"odd": loaders}
        )
        trainer = trainer_on(devices, folder, metrics)
        getattr(trainer, run)(new_model(folder), datamodule=Odd())
        found = trainer.callback_metrics.items()
        numbers.append({name: float(x) for name, x in found if name.startswith("regression")})
    return numbers


def on_rank(folder: Path) -> tuple[list[ReleaseReport], list[dict[str, float]], list[str]]:
    reports = [judged(folder, reference, 2) for reference in ("trained.ckpt", "old.csv")]
    messages = []
    model = Sharded()
    for trainer, kind in (
        (trainer_on(2, folder, quick_repair()), "fit"),
        (trainer_on(2, folder, ReleaseGate(folder / "trained.ckpt"), split=2), "test"),
    ):
        with pytest.raises(ConfigurationError) as refused:
            getattr(trainer, kind)(model, datamodule=Odd())
        messages.append(str(refused.value))
    metrics = RegressionMetrics(folder / "trained.ckpt", loaders={"torn": DataLoader(Torn(), 16)})
    with pytest.raises((OSError, OtherRankError)) as error:
        trainer_on(2, folder, metrics).fit(new_model(folder), datamodule=Odd())
    messages.append(str(error.value))
    return reports, counted(folder, 2), messages


def test_two_ranks_with_parts_of_the_weights_count_as_one_process(trained_path):
    folder = trained_path.parent
    old = Sharded()
    old.load_state_dict(torch.load(trained_path, weights_only=True)["state_dict"])
    gate = ReleaseGate(trained_path, verbose=False, dirpath=folder / "old")
    trainer_on(1, folder, gate).test(old, datamodule=Odd(), verbose=False)
    Path(gate.report.files["predictions"]).rename(folder / "old.csv")
    alone = judged(folder, "trained.ckpt", 1)
    metrics = counted(folder, 1)
    assert alone.rows[0].counts.n == 193
    assert alone.rows[0].counts.broken > 0
    for rank, (reports, together, messages) in enumerate(in_two_processes(on_rank, folder)):
        for report in reports:
            assert (report.rows, report.findings) == (alone.rows, alone.findings)
            assert (report.new.sha256, report.old.sha256) == (alone.new.sha256, alone.old.sha256)
        assert together == metrics
        for message in messages[:2]:
            assert "ModelParallelStrategy shards the weights" in message
            assert (
                "`ReleaseGate` and `RegressionMetrics` run under "
                "`ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)`"
            ) in message
        assert messages[2].startswith(
            ("`torn` data could not be read on another rank. OSError", "no such image")[rank]
        )
    saved = [Predictions.read(folder / name / "predictions.csv") for name in ("ckpt1", "ckpt2")]
    assert saved[0] == saved[1]
