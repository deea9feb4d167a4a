"""What the small constant of the loss terms decides: one row of Table II with several values of delta.

    python examples/case_study/delta.py --data digits            # three seeds of EXP-B1 on the network of B
    python examples/case_study/delta.py --row EXP-C1 --experiment C --seeds 10

The loss ratio is read as `bounded`, the default, and as `inverse_ratio`. What was run is kept in `runs/`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from statistics import fmean

from network import EPOCHS, trained
from rich import box, print
from rich.table import Table
from study import DATA, setting_of, swept

from lightning_nrl.presets import TABLE_II

DELTAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
LOSS_TERMS = ("bounded", "inverse_ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="vehicles")
    parser.add_argument("--experiment", choices="ABC", default="B")
    parser.add_argument("--row", choices=TABLE_II, default="EXP-B1")
    parser.add_argument("--seeds", type=int, default=3, help="of the search")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the training")
    chosen = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    data = DATA[chosen.data](chosen.experiment, 0, None)
    name = f"{chosen.data}_{chosen.experiment}_0"
    checkpoint = trained(data, Path("runs") / f"{name}.ckpt", 0, chosen.epochs)
    table = Table(title=f"{chosen.row} on {name}, means of {chosen.seeds} seeds", box=box.SIMPLE_HEAD)
    for head in ("loss term", "delta", "known:\nrepaired", "\nbroken", "unseen:\nrepaired", "\nbroken"):
        table.add_column(head, justify="right")
    settings = {
        f"{term} {delta:g}": setting_of(TABLE_II[chosen.row], term, delta) for term in LOSS_TERMS for delta in DELTAS
    }
    folder = Path("runs") / f"delta_{name}_{chosen.row}"
    named = [{**setting, "name": label} for label, setting in settings.items()]
    result = swept(data, chosen.experiment, checkpoint, named, chosen.seeds, folder)
    for label in settings:
        runs = [(run.known, run.unseen) for run in result.of(label)]
        known, unseen = zip(*runs, strict=True)
        means = (
            fmean(one.repaired_in_target for one in known),
            fmean(one.broken for one in known),
            fmean(one.repaired for one in unseen),
            fmean(one.broken for one in unseen),
        )
        table.add_row(*label.split(), *(f"{value:.1f}" for value in means))
    first = result.runs[0]
    print(table)
    print(f"{first.known.targeted} known targets, {first.known.passed} known and {first.unseen.passed} unseen passed")


if __name__ == "__main__":
    main()
