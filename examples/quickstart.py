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
from rich import print
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
    print(
        "\nknown: the repair looked at it.  unseen: it never did; what happens there cannot be promised, but counted."
    )
    print("repaired: wrong before, right now.  broken: right before, wrong now.\n")
    print(f"The repaired model:  {repair.repaired_model_path or 'none, the weights are those of training'}")
    print(f"To look inside:      tensorboard --logdir {trainer.log_dir}")


def many_repairs(seeds: range) -> None:
    reports = []
    for seed in seeds:
        reports.append(train_and_repair(seed, verbose=False)[0].report)
        print(f"seed {seed}: {reports[-1].reason}")
    print(table_of(seeds, reports))


def table_of(seeds: range, reports: list[RepairReport]) -> Table:
    """One row a seed and one for their mean; beside each repair the untouched model."""
    names = ("tilted failures", "repaired", "broken", "repaired", "broken", "untouched", "repaired", "verdict")
    heads = ("known:", "known:", "known:", "unseen:", "unseen:", "unseen accuracy:", "unseen accuracy:", "")
    table = Table("seed", *(f"{head}\n{name}" for head, name in zip(heads, names, strict=True)))
    rows = []
    for seed, report in zip(seeds, reports, strict=True):
        known, unseen = report.pooled("known"), report.pooled("unseen")
        counts = (known.targeted, known.repaired, known.broken, unseen.repaired, unseen.broken)
        rows.append((*counts, unseen.accuracy_before, unseen.accuracy_after))
        table.add_row(str(seed), *map(shown, rows[-1]), report.status)
    table.add_section()
    table.add_row("mean", *(shown(mean(column)) for column in zip(*rows, strict=True)), "")
    return table


def shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.3f}" if number <= 1 else f"{number:.1f}"


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
