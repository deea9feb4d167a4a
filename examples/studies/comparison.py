"""Repairs and baselines beside each other: a table and a picture for each seed.

    python examples/studies/comparison.py vehicles-C --max-time 80
    python examples/studies/comparison.py vehicles-C --methods finetune-polish fine-tuning distillation

`--max-time` is what each method may take; retraining takes as long as the training took. What was run before is read
from `runs/comparison_<problem>_<seed>/`, whatever it was run with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from problems import PROBLEMS, RUNS, quiet_trainer, start, trained
from rich import print

from lightning_nrl import ConfigurationError, compare
from lightning_nrl.analysis.comparison import Comparison


def compared(name: str, seed: int, folder: Path, **arguments: object) -> Comparison:
    """The comparison of one seed: read if it was run before, else run and saved, with its picture."""
    path = folder / "comparison.json"
    if path.exists():
        return Comparison.from_json(path.read_text())
    problem, (checkpoint, _) = PROBLEMS[name], trained(name, seed)
    comparison = compare(
        quiet_trainer(),
        problem.network(),
        datamodule=problem.data(seed),
        ckpt_path=checkpoint,
        target=problem.target,
        seed=seed,
        **arguments,
    )
    comparison.save(folder)
    try:
        comparison.plot(folder / "comparison.png")
    except ConfigurationError as error:
        print(error)
    return comparison


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--max-time", type=float, help="seconds for each method but retraining")
    parser.add_argument("--methods", nargs="+", help="names of methods and baselines; all if there are none")
    chosen = parser.parse_args()
    start()
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        folder = RUNS / f"comparison_{chosen.problem.replace('-', '_')}_{seed}"
        comparison = compared(chosen.problem, seed, folder, max_time=chosen.max_time, methods=chosen.methods)
        print(comparison)
        print(f"Its files:  {folder}\n")
