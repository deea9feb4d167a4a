"""Repairs the paper's kind of network on vehicles, with ten seeds of data, training and repair: one table.

    python examples/case_study/repairs.py --experiment C --max-time 80    # seconds for each repair
    python examples/case_study/repairs.py --experiment C                  # as long as the training took
    python examples/case_study/repairs.py --experiment C --method convex
    python examples/case_study/repairs.py --experiment fashion            # a smaller network on Fashion-MNIST

Experiment C: front and back views, rare in training and common in operation; A: partly occluded vehicles; fashion:
garments upside down, rare in training and common in operation. What was run before is read from `runs/`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

from lightning.pytorch import Trainer
from network import BACK, FRONT
from rich import print
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from in_use import fashion, vehicles
from seeds import reports_of, table_of

from lightning_nrl import RepairReport, Target, repair


def front_or_back(batch: tuple[Tensor, ...]) -> Tensor:
    return (batch[2] == FRONT) | (batch[2] == BACK)


def occluded(batch: tuple[Tensor, ...]) -> Tensor:
    return batch[3]


def upside_down(batch: tuple[Tensor, ...]) -> Tensor:
    return batch[2]


TARGETS = {
    "A": Target.where(occluded, name="partly occluded"),
    "B": Target.where(front_or_back, name="front or back view"),
    "C": Target.where(front_or_back, name="front or back view"),
    "fashion": Target.where(upside_down, name="upside down"),
}


def repaired(experiment: str, seed: int, folder: Path, **arguments: object) -> RepairReport:
    """Trains a network, unless it is there, and repairs it, all with one seed."""
    trained = fashion(seed) if experiment == "fashion" else vehicles(seed, experiment=experiment)
    trainer = Trainer(devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    return repair(
        trainer,
        trained.data.network(),
        datamodule=trained.data,
        ckpt_path=trained.checkpoint(),
        target=TARGETS[experiment],
        unseen="test",
        seed=seed,
        dirpath=folder,
        verbose=False,
        **arguments,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", choices=TARGETS, default="C")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--method", default="auto", help="how new weights are found")
    parser.add_argument("--max-time", type=float, help="seconds for each repair")
    chosen = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    limit = "" if chosen.max_time is None else f"_{chosen.max_time:g}s"
    data = chosen.experiment if chosen.experiment == "fashion" else f"vehicles_{chosen.experiment}"
    name = f"{data}_{chosen.method}{limit}"
    reports = reports_of(
        Path("runs") / name,
        range(chosen.first, chosen.first + chosen.seeds),
        lambda seed, folder: repaired(chosen.experiment, seed, folder, method=chosen.method, max_time=chosen.max_time),
    )
    print(table_of(reports, f"Experiment {chosen.experiment} repaired by method={chosen.method!r}"))
