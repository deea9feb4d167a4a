"""Problems of the studies: networks whose training data lack something, made from a seed.

- `slashed-zeros` is the quickstart. `weak-digit` is MNIST with too few eights. `toolkit` has the
  same digits, split for about as many targets and known samples as in the public toolkit's figures.
- `fashion` has upside-down garments, rare in training and common later; `fashion-growth` has more
  of the same images later (both need Debian's dataset-fashion-mnist).
- `vehicles-A` has partly occluded vehicles, `vehicles-B` front and back views, `vehicles-C` the
  same, rare in training.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from scipy import stats

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in (".", "case_study"))
from digits import DigitNet, SlashedZeros, slashed_zero
from fashion_mnist import DriftingFashion, FashionNet, GrowingFashion, LeNet5
from network import EPOCHS, TARGETS, VehicleNet, Vehicles
from weak_digit import SPLITS, WEAK, DigitCNN, WeakDigit

from lightning_nrl import Target

RUNS = Path("runs")
CHECKPOINTS = 10
"""Number of checkpoints kept per training, evenly spaced; the last one is the network to repair."""

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """Network to train and repair, for any seed, with data in `train`, `repair` and `test`.

    `layers`: the last layer, the one before it that has weights, and a deeper one.
    """

    data: Callable[[int], LightningDataModule]
    network: Callable[[], LightningModule]
    epochs: int
    target: Target
    layers: tuple[str, ...] = ()


def quiet_trainer(epochs: int = 1, *callbacks: Callback, **arguments: Any) -> Trainer:
    """Returns a trainer without progress bar, logger and checkpoints."""
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
    )
    return Trainer(
        **{"max_epochs": epochs, "devices": 1, "callbacks": list(callbacks), **quiet, **arguments}
    )


def start() -> None:
    """Silences logs and warnings of other packages."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table as Markdown."""
    lines = [("", *heads), ["---", *["---:"] * len(heads)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(values: Sequence[float], form: str = ".1f") -> str:
    """Formats the mean and half of its 95 % t interval; only the mean for a single value."""
    if len(values) < 2:
        return format(values[0], form)
    return f"{fmean(values):{form}} ± {half_interval(values):{form.lstrip('+')}}"


def half_interval(values: Sequence[float]) -> float:
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


class CheckpointsOfTraining(Callback):
    """Saves the weights of some epochs."""

    def __init__(self, epochs: int) -> None:
        self.states: list[State] = []
        self.kept = {round(epochs * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 in self.kept:
            self.states.append(
                {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
            )


def trained(name: str, seed: int, epochs: int | None = None) -> tuple[Path, list[State]]:
    """Returns the checkpoints of a problem's training, the last one first.

    Trains if `runs/` has none.
    """
    problem = PROBLEMS[name]
    short = "" if epochs in (None, problem.epochs) else f"_{epochs}_epochs"
    checkpoint = RUNS / f"{name.replace('-', '_')}_{seed}{short}.ckpt"
    states = checkpoint.with_suffix(".pt")
    if not checkpoint.exists() or not states.exists():
        epochs = epochs or problem.epochs
        kept = CheckpointsOfTraining(epochs)
        trainer = quiet_trainer(epochs, kept)
        seed_everything(seed, verbose=False)
        trainer.fit(problem.network(), datamodule=problem.data(seed))
        RUNS.mkdir(exist_ok=True)
        torch.save(kept.states, states)
        trainer.save_checkpoint(checkpoint)
    return checkpoint, torch.load(states, weights_only=True)[:-1]


def _vehicles(experiment: str) -> Problem:
    layers = ("classifier", "features.15.body.3", "features.14.body.3")
    return Problem(partial(Vehicles, experiment), VehicleNet, EPOCHS, TARGETS[experiment], layers)


_WEAK = {
    "network": DigitCNN,
    "epochs": 30,
    "target": Target.label(WEAK),
    "layers": ("classifier", "features.10", "features.6"),
}
PROBLEMS = {
    "slashed-zeros": Problem(SlashedZeros, DigitNet, 30, Target.where(slashed_zero)),
    "weak-digit": Problem(partial(WeakDigit, splits=SPLITS), **_WEAK),
    "toolkit": Problem(
        partial(WeakDigit, splits={"train": 0.35, "repair": 0.5, "test": 0.15}), **_WEAK
    ),
    "fashion": Problem(
        DriftingFashion,
        FashionNet,
        10,
        Target.where(lambda batch: batch[2], name="upside down"),
        ("classifier", "features.17", "features.11"),
    ),
    "fashion-growth": Problem(GrowingFashion, LeNet5, 10, Target.all()),
    **{f"vehicles-{experiment}": _vehicles(experiment) for experiment in "ABC"},
}
