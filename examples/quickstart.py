"""Repairs a digit classifier on slashed zeros without breaking what it gets right. Under a minute on two cores.

    python examples/quickstart.py              # one repair, explained
    python examples/quickstart.py --seeds 10   # ten of them, each with its own data, training and repair: one table

The data and the network are in `digits.py`; all that a repair needs is in `train_and_repair`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from statistics import mean

import torch
from digits import DigitNet, SlashedZeros
from pytorch_lightning import Trainer, seed_everything
from rich import box, print
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_nrl import RegressionFreeRepair, RepairReport, Target


def slashed_zero(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    _image, _digit, slashed = batch
    return slashed


def train_and_repair(seed: int, verbose: bool = True) -> tuple[RegressionFreeRepair, Trainer]:
    seed_everything(seed, verbose=False)
    repair = RegressionFreeRepair(target=Target.where(slashed_zero), unseen="test", seed=seed, verbose=verbose)
    trainer = Trainer(
        max_epochs=30,
        accelerator="cpu",
        callbacks=[repair],
        log_every_n_steps=20,
        enable_progress_bar=verbose,
        enable_model_summary=False,
    )
    trainer.fit(DigitNet(), datamodule=SlashedZeros(seed))
    return repair, trainer


def one_repair(seed: int) -> None:
    repair, trainer = train_and_repair(seed)
    print("\nknown: the repair looked at it.  unseen: it never did; what happens there is counted, not promised.")
    print("repaired: wrong before, right now.  broken: right before, wrong now.\n")
    print(f"The repaired model:  {repair.repaired_model_path or 'none, the weights are those of training'}")
    print(f"To look inside:      tensorboard --logdir {trainer.log_dir}")


def many_repairs(seeds: range) -> None:
    reports = [train_and_repair(seed, verbose=False)[0].report for seed in track(seeds, "Training and repairing")]
    print(table_of(reports))


def table_of(reports: list[RepairReport]) -> Table:
    """One row a seed and one for their mean; the accuracy on unseen data beside that of the untouched model."""
    accepted = sum(report.status == "repaired" for report in reports)
    table = Table(
        title="Repair of slashed zeros",
        caption=f"known: searched; unseen: only counted. Accepted: {accepted} of {len(reports)} repairs.",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    heads = ("seed", "known:\ntargeted", "\nrepaired", "\nbroken", "unseen:\nrepaired", "\nbroken")
    for head in (*heads, "accuracy:\nuntouched", "\nrepaired"):
        table.add_column(head, justify="right")
    rows = []
    for report in reports:
        known, unseen = report.pooled("known"), report.pooled("unseen")
        *counts, before, after = (
            *(known.targeted, known.repaired_in_target, known.broken),
            *(unseen.repaired, unseen.broken, unseen.accuracy_before, unseen.accuracy_after),
        )
        table.add_row(str(report.seed), *map(str, counts), f"{before:.3f}", f"{after:.3f}")
        rows.append((*counts, before, after))
    *counts, before, after = (mean(column) for column in zip(*rows, strict=True))
    table.add_section()
    table.add_row("mean", *(f"{x:.1f}" for x in counts), f"{before:.3f}", f"{after:.3f}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of data, training and repair")
    parser.add_argument("--seeds", type=int, help="how many repairs, from seed 0; prints one table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the network is so small that threads only wait for each other
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    if arguments.seeds:
        many_repairs(range(arguments.seeds))
    else:
        one_repair(arguments.seed)
