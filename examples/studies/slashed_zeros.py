"""The repair of the quickstart with ten seeds of data, training and repair: one table.

    python examples/studies/slashed_zeros.py --seeds 10

What was run before is read from `runs/`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from rich import print
from seeds import reports_of, table_of

from lightning_nrl import RegressionFreeRepair, RepairReport, Target

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits import DigitNet, SlashedZeros
from quickstart import slashed_zero


def repaired(seed: int, folder: Path) -> RepairReport:
    """Trains a network and repairs it by the default, all with one seed."""
    seed_everything(seed, verbose=False)
    repair = RegressionFreeRepair(
        target=Target.where(slashed_zero), unseen="test", seed=seed, dirpath=folder, verbose=False
    )
    trainer = Trainer(
        max_epochs=30,
        accelerator="cpu",
        callbacks=[repair],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(DigitNet(), datamodule=SlashedZeros(seed))
    return repair.report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the network is so small that threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    print(table_of(reports_of(Path("runs") / "slashed_zeros", seeds, repaired), "Repair of slashed zeros"))
