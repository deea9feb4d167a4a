"""Repairs and baselines beside each other on vehicles: a table, a picture and a verdict for each seed.

    python examples/case_study/comparison.py --experiment C --max-time 80
    python examples/case_study/comparison.py --methods finetune-polish fine-tuning distillation

`--max-time` is what each method may take; retraining takes as long as the training took. Below the table: does the
repair break fewer unseen samples than a baseline where it repairs as many? What was run before is read from
`runs/comparison_<experiment>_<seed>/`, whatever it was run with.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from pathlib import Path

from lightning.pytorch import Trainer
from network import VehicleNet, Vehicles, trained
from repairs import TARGETS
from rich import box, print
from rich.table import Table

from lightning_nrl import ConfigurationError, compare
from lightning_nrl.analysis.baselines import BASELINES
from lightning_nrl.analysis.comparison import Comparison

REPAIR = "finetune-polish"


def compared(experiment: str, seed: int, folder: Path, **arguments: object) -> Comparison:
    """The comparison of one seed: read if it was run before, else run and saved, with its picture."""
    path = folder / "comparison.json"
    if path.exists():
        return Comparison.from_json(path.read_text())
    data = Vehicles(experiment, seed)
    checkpoint = trained(data, Path("runs") / f"vehicles_{experiment}_{seed}.ckpt", seed)
    comparison = compare(
        Trainer(devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False),
        VehicleNet(),
        datamodule=data,
        ckpt_path=checkpoint,
        target=TARGETS[experiment],
        seed=seed,
        **arguments,
    )
    comparison.save(folder)
    try:
        comparison.plot(folder / "comparison.png")
    except ConfigurationError as error:
        print(error)
    return comparison


def head_to_head(comparison: Comparison, repair: str = REPAIR) -> Table:
    """Each baseline at each point of its curve beside a repair that repairs as many unseen samples."""
    table = Table(
        title=f"Unseen samples: what {repair} breaks where it repairs as many",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("baseline")
    for head in ("t", "repaired", "broken", repair):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    found = [one for one in comparison.head_to_head(repair) if one.method in BASELINES]
    for one in found:
        unseen, reached = one.point.unseen, not math.isnan(one.broken)
        words = "never repairs as many" if not reached else "fewer" if one.fewer else "not fewer"
        counts = (f"{one.point.strength:.2f}", f"{unseen.repaired:,}", f"{unseen.broken:,}")
        table.add_row(one.method, *counts, f"{one.broken:.1f}" if reached else "-", words)
    given = [one for one in found if one.point.strength == 1]
    table.caption = (
        f"{repair} breaks fewer at {sum(one.fewer for one in found)} of {len(found)} points, "
        f"at {sum(one.fewer for one in given)} of {len(given)} where t = 1: as the baseline gave it."
    )
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", choices="ABC", default="C")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--max-time", type=float, help="seconds for each method but retraining")
    parser.add_argument("--methods", nargs="+", help="names of methods and baselines; all if there are none")
    chosen = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        folder = Path("runs") / f"comparison_{chosen.experiment}_{seed}"
        comparison = compared(chosen.experiment, seed, folder, max_time=chosen.max_time, methods=chosen.methods)
        print(comparison)
        if any(entry.method == REPAIR and entry.curve for entry in comparison.entries):
            print(head_to_head(comparison))
        print(f"Its files:  {folder}\n")
