"""Measures seconds and memory of a repair as samples, parameters, classes and processes grow.

    python examples/studies/cost.py                          # prints a table; draws cost.svg
    python examples/studies/cost.py --axis samples --most 100000

Data are random, with labels from a random network; a small network is trained for three epochs and
repaired by the default. Each row is a process of its own in one thread. *Training* is the stage
`fit` of the report, *ratio* the time of all stages to its time. *Bytes a sample* are the largest
memory of the process beyond that before the repair, for each known sample.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1]))
from output import quiet_trainer, start

from lightning_nrl import RegressionFreeRepair

N_INPUTS = 32
NOISE = 1.0  # of centres at a distance of about 8
BATCH_SIZE = 512
AXES = {
    "samples": (10_000, 100_000, 1_000_000),
    "parameters": (100_000, 1_000_000, 10_000_000, 100_000_000),
    "classes": (10, 100, 1_000, 10_000),
    "processes": (1, 2),
}
USUAL = {"samples": 20_000, "parameters": 10_000, "classes": 10, "processes": 1}
FEW_SAMPLES = 2_000  # where parameters or classes grow, since a pass takes longer there


class Network(LightningModule):
    def __init__(self, n_parameters: int, n_classes: int) -> None:
        super().__init__()
        width = max(8, round(n_parameters**0.5))
        self.layers = nn.Sequential(
            nn.Linear(N_INPUTS, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, n_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class RandomData(LightningDataModule):
    """Samples around a centre per class; those of class 0 get a second centre that training lacks.

    A tenth of the samples are validation data. There, half of class 0 lies around the second
    centre: failures to repair, as when a camera sees a new kind of car.
    """

    def __init__(self, n: int, n_classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(n_classes, N_INPUTS, generator=generator)
        y = torch.randint(n_classes, (n,), generator=generator)
        x = torch.randn(n, N_INPUTS, generator=generator).mul_(NOISE)
        n_train = n - n // 10
        sign = torch.ones(n, 1)
        sign[n_train:][(y[n_train:] == 0) & (torch.arange(n - n_train) % 2 == 0)] = -1
        for rows in torch.arange(n).split(10_000):
            x[rows] += sign[rows] * centres[y[rows]]
        self.train = TensorDataset(x[:n_train], y[:n_train])
        self.val = TensorDataset(x[n_train:], y[n_train:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, BATCH_SIZE, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, BATCH_SIZE)


class Measured(RegressionFreeRepair):
    """Notes the memory and the time just before the repair."""

    def repair_now(self, trainer: Trainer, *arguments: Any, **named: Any) -> Any:
        self.memory_before = _peak_memory()
        self.began = time.perf_counter()
        return super().repair_now(trainer, *arguments, **named)


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(axis: str, size: int) -> dict[str, float]:
    """Trains and repairs; returns seconds and memory."""
    sizes = {**USUAL, axis: size}
    if axis in ("parameters", "classes"):
        sizes["samples"] = FEW_SAMPLES if size >= 10_000_000 or axis == "classes" else 10_000
    seed_everything(0, verbose=False)
    data = RandomData(sizes["samples"], sizes["classes"])
    repair = Measured(verbose=False, dirpath="cost")
    trainer = quiet_trainer(3, repair)
    if sizes["processes"] > 1:
        trainer = quiet_trainer(3, repair, devices=sizes["processes"], strategy="ddp_fork")
    trainer.fit(Network(sizes["parameters"], sizes["classes"]), datamodule=data)
    report = repair.report
    seconds = report.seconds
    known = [split for split in report.splits if split.role == "known"]
    return {
        "size": size,
        "known": sum(split.n for split in known),
        "repaired": sum(split.repaired_in_target for split in known),
        "broken": sum(split.broken for split in known),
        "pass": seconds.get("collect", 0.0),
        "training": seconds.get("fit", 0.0),
        "polish": seconds.get("polish", 0.0),
        "all": sum(seconds.values()),
        "memory": _peak_memory() - getattr(repair, "memory_before", 0),
    }


def in_new_process(axis: str, size: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--axis", axis, "--only", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(axis: str, rows: list[dict[str, float]]) -> None:
    print(f"\n| {axis} | repaired | broken | a pass | training | polish | all, s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = row["all"] / row["training"] if row["training"] else float("nan")
        times = " | ".join(f"{row[name]:.1f}" for name in ("pass", "training", "polish", "all"))
        counts = f"{row['repaired']:,} | {row['broken']:,}"
        print(f"| {row['size']:,} | {counts} | {times} | {ratio:.1f} |", flush=True)
    if axis == "samples":
        for row in rows:
            print(f"{row['size']:,} samples: {row['memory'] / row['known']:.0f} bytes a sample")


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (axis, rows) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        for name in ("pass", "training", "polish", "all"):
            axes.plot([row["size"] for row in rows], [row[name] for row in rows], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel=axis)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    given = start(
        __doc__,
        **{
            "--axis": {"choices": list(AXES), "help": "what grows; by default, each in turn"},
            "--most": {"type": float, "default": float("inf"), "help": "largest size"},
            "--only": {"type": int, "help": "one size, in this process; prints JSON"},
            "--out": {"default": "cost.svg", "help": "figure to write"},
        },
    )
    if given.only:
        print(json.dumps(measure(given.axis, given.only)))
        sys.exit()
    results = {}
    for axis in [given.axis] if given.axis else AXES:
        most = 10_000 if given.fast else given.most
        sizes = [size for size in AXES[axis] if size <= most]
        results[axis] = [in_new_process(axis, size) for size in sizes]
        show(axis, results[axis])
    if len(results) == len(AXES):
        draw(results, Path(given.out))
