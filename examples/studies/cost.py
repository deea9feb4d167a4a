"""Measures seconds, passes and memory of a repair as samples, parameters and so on grow.

    python examples/studies/cost.py                          # prints tables; draws cost.svg
    python examples/studies/cost.py --axis samples --most 100000
    python examples/studies/cost.py --axis samples --max-time 20   # says how long repairs took

A network is trained for three epochs on samples around random centres, and repaired by the default.
Each row is a process of its own in one thread. *Training* is the stage `fit` of the report, *ratio*
the time of all stages to its time. *Passes* are forward passes over the known data, without
training steps; the second number is those of the stage `fit`. *MB* is the largest memory beyond
that before the repair, which Linux tells; the second table has both by stage.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from lightning_nrl._utils.timing import StageTimer

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
    """Notes the memory just before the repair, and by stage the largest memory beyond it, in MB."""

    def repair_now(self, trainer: Trainer, *arguments: Any, **named: Any) -> Any:
        self.megabytes: dict[str, float] = {}
        began = time.perf_counter()
        before = _memory()
        run_stage = StageTimer.stage

        def note(stage: str) -> None:
            used = max(self.megabytes.get(stage, 0.0), _memory(largest=True) - before)
            self.megabytes[stage] = round(used, 1)
            Path("/proc/self/clear_refs").write_text("5")  # forgets the largest memory

        @contextmanager
        def measured_stage(timer: StageTimer, name: str) -> Iterator[None]:
            note("other")
            with run_stage(timer, name):
                yield
            note(name)

        StageTimer.stage = measured_stage  # type: ignore[method-assign]
        try:
            return super().repair_now(trainer, *arguments, **named)
        finally:
            note("other")
            self.took = time.perf_counter() - began
            StageTimer.stage = run_stage  # type: ignore[method-assign]


def _memory(*, largest: bool = False) -> float:
    """Returns the memory of the process, now or at its largest, in MB."""
    name = "VmHWM:" if largest else "VmRSS:"
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index(name) + 1]) * 1024 / 1e6


def measure(axis: str, size: int, max_time: float | None) -> dict[str, Any]:
    """Trains and repairs; returns seconds and memory."""
    sizes = {**USUAL, axis: size}
    if axis in ("parameters", "classes"):
        sizes["samples"] = FEW_SAMPLES if size >= 10_000_000 or axis == "classes" else 10_000
    seed_everything(0, verbose=False)
    data = RandomData(sizes["samples"], sizes["classes"])
    repair = Measured(max_time=max_time, verbose=False, dirpath="cost")
    trainer = quiet_trainer(3, repair)
    if sizes["processes"] > 1:
        trainer = quiet_trainer(3, repair, devices=sizes["processes"], strategy="ddp_fork")
    trainer.fit(Network(sizes["parameters"], sizes["classes"]), datamodule=data)
    report = repair.report
    known = [split for split in report.splits if split.role == "known"]
    return {
        "size": size,
        "known": sum(split.n for split in known),
        "repaired": sum(split.repaired_in_target for split in known),
        "broken": sum(split.broken for split in known),
        "seconds": dict(report.seconds),
        "passes": dict(report.passes),
        # Of a child process they are unknown.
        "megabytes": vars(repair).get("megabytes", {}),
        "took": vars(repair).get("took", 0.0),
    }


def in_new_process(axis: str, size: int, max_time: float | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--axis", axis, "--only", str(size)]
    if max_time is not None:
        command += ["--max-time", str(max_time)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def all_seconds(row: dict[str, Any]) -> float:
    return sum(row["seconds"].values())


def all_megabytes(row: dict[str, Any]) -> float:
    return max(row["megabytes"].values(), default=float("nan"))


def show(axis: str, rows: list[dict[str, Any]]) -> None:
    print(
        f"\n| {axis} | repaired | broken | a pass, s | training, s | all, s | ratio | passes | MB |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        one_pass, training = row["seconds"]["collect"], row["seconds"].get("fit", 0.0)
        ratio = all_seconds(row) / training if training else float("nan")
        counts = f"{row['size']:,} | {row['repaired']:,} | {row['broken']:,}"
        times = f"{one_pass:.1f} | {training:.1f} | {all_seconds(row):.1f} | {ratio:.1f}"
        memory = f"{all_megabytes(row):,.0f}" if row["megabytes"] else ""
        in_training = row["passes"].get("fit", 0.0)
        passes = f"{sum(row['passes'].values()) - in_training:.1f} + {in_training:.1f}"
        print(f"| {counts} | {times} | {passes} | {memory} |", flush=True)
    sizes = " | ".join(format(row["size"], ",") for row in rows)
    print(f"\n| stage | {sizes} |")
    print(f"|---|{'---:|' * len(rows)}")
    for stage in dict.fromkeys(stage for row in rows for stage in row["seconds"]):
        cells = []
        for row in rows:
            seconds, megabytes = row["seconds"].get(stage), row["megabytes"].get(stage)
            cell = "" if seconds is None else f"{seconds:.1f} s"
            cells.append(cell if megabytes is None else f"{cell}, {megabytes:,.0f} MB")
        print(f"| {stage} | {' | '.join(cells)} |", flush=True)


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    grid = figure.subplots(2, len(results), sharex="col", sharey="row")
    for (above, below), (axis, rows) in zip(grid.T, results.items(), strict=True):
        sizes = [row["size"] for row in rows]
        for label, stage in (("a pass", "collect"), ("training", "fit")):
            above.plot(sizes, [row["seconds"].get(stage) for row in rows], "o-", label=label)
        above.plot(sizes, [all_seconds(row) for row in rows], "o-", label="all stages")
        below.plot(sizes, [all_megabytes(row) for row in rows], "o-", color="C3")
        above.set(yscale="log")
        below.set(yscale="log", xlabel=axis)
        if axis == "processes":
            below.set_xticks(sizes)
        else:
            below.set_xscale("log")
    grid[0, 0].set_ylabel("seconds")
    grid[1, 0].set_ylabel("MB")
    grid[0, -1].legend(fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    given = start(
        __doc__,
        **{
            "--axis": {"choices": list(AXES), "help": "what grows; by default, each in turn"},
            "--most": {"type": float, "default": float("inf"), "help": "largest size"},
            "--max-time": {"type": float, "help": "limit of a repair, in seconds"},
            "--only": {"type": int, "help": "one size, in this process; prints JSON"},
            "--out": {"default": "cost.svg", "help": "figure to write"},
        },
    )
    if given.only:
        print(json.dumps(measure(given.axis, given.only, given.max_time)))
        sys.exit()
    results = {}
    for axis in [given.axis] if given.axis else AXES:
        most = 10_000 if given.fast else given.most
        sizes = [size for size in AXES[axis] if size <= most]
        if not sizes:
            continue
        results[axis] = [in_new_process(axis, size, given.max_time) for size in sizes]
        show(axis, results[axis])
        if given.max_time is not None:
            took = ", ".join(f"{row['took']:.1f}" for row in results[axis])
            print(f"\nThe repairs took {took} s of {given.max_time:g} s.")
    if not given.axis:
        draw(results, Path(given.out))
