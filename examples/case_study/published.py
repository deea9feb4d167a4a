"""The published methods beside the default and the untouched model: what each repairs and breaks, over seeds.

    python examples/case_study/published.py --seeds 10                   # the weak digit of examples/studies
    python examples/case_study/published.py --seeds 10 --problem toolkit # as many samples as in the toolkit's figures

Three convolutions and a head of 64 inputs and 10 outputs on MNIST's digits. What the published methods find is counted
as it is, whatever it breaks; a method with the gate `instance` may break no known sample. Arachne scores 200 sampled
passed samples, as published; `merged` has a repair by Arachne for each digit that eights are taken for. What was run
before is read from `runs/published`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from rich import print
from rich.table import Table
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

from weak_digit import EPOCHS, SPLITS, WEAK, DigitCNN, WeakDigit

from lightning_nrl import BoundOptions, RepairReport, SearchOptions, Target, repair
from lightning_nrl.localization import NeuRecover
from lightning_nrl.methods import Apricot, bundle

PROBLEMS: Mapping[str, Mapping[str, float]] = {
    "weak-digit": SPLITS,
    "toolkit": {"train": 0.35, "repair": 0.5, "test": 0.15},
}
"""Shares of 5,000 digits. The second has about as many targets and known samples as the toolkit's figures."""

CHECKPOINTS = 10
HEAD = "classifier"

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """What one method did in one run; `right` and `right_before` are shares of all unseen samples."""

    method: str
    seed: int
    targets: int = 0
    passed: int = 0
    repaired: int = 0
    broken: int = 0
    unseen_repaired: int = 0
    unseen_broken: int = 0
    right_before: float = 0.0
    right: float = 0.0
    seconds: float = 0.0
    note: str = ""


class CheckpointsOfTraining(Callback):
    """Keeps the weights of ten epochs, at equal distances, of the last one too."""

    def __init__(self, epochs: int) -> None:
        self.states: list[State] = []
        self.kept = {round(epochs * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 in self.kept:
            self.states.append({name: value.detach().clone() for name, value in pl_module.state_dict().items()})


def quiet(**arguments: Any) -> Trainer:
    """A trainer that shows and keeps nothing."""
    shown = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    return Trainer(**shown, **arguments)


def train(
    seed: int, network: Callable[[], LightningModule], data: LightningDataModule, epochs: int
) -> tuple[Trainer, list[State]]:
    """The trainer of a new network, and the weights that it had on the way."""
    seed_everything(seed, verbose=False)
    kept = CheckpointsOfTraining(epochs)
    trainer = quiet(max_epochs=epochs, callbacks=[kept])
    trainer.fit(network(), train_dataloaders=data.train_dataloader())
    return trainer, kept.states


def trained(problem: str, seed: int, folder: Path) -> tuple[Path, list[State]]:
    """The checkpoint of a seed's network and its weights on the way there; from files if it was trained before."""
    states, checkpoint = folder / f"{problem}_{seed}.pt", folder / f"{problem}_{seed}.ckpt"
    if not states.exists():
        trainer, kept = train(seed, DigitCNN, WeakDigit(seed, PROBLEMS[problem]), EPOCHS)
        trainer.save_checkpoint(checkpoint)
        torch.save(kept, states)
    return checkpoint, torch.load(states, weights_only=True)


def methods(history: Sequence[State]) -> dict[str, dict[str, Any]]:
    """Arguments of each repair by the name of its row."""
    as_found: dict[str, Any] = {"layer": HEAD, "gate": "tolerance:100%", "bounds": BoundOptions(strength=1.0)}
    arachne = {**as_found, "search": SearchOptions(n_passed=200)}
    last = bundle("neurecover", localizer=NeuRecover(history, last=1))
    return {
        "default": {},
        "swarm, head": {"layer": HEAD, "method": "swarm"},
        "neurecover-lite": {**as_found, "method": "neurecover-lite"},
        "neurecover": {**as_found, "method": bundle("neurecover", localizer=NeuRecover(history))},
        "neurecover, last two": {**as_found, "method": last},
        "arachne": {**arachne, "method": "arachne"},
        "arachne-de": {**arachne, "method": "arachne-de"},
        "merged": {**arachne, "method": "merged"},
        "apricot, no polish": {"method": Apricot(history[-5:], polish=False), "gate": "accuracy"},
        "apricot": {"method": Apricot(history[-5:])},
    }


def run(problem: str, seed: int, folder: Path, names: Sequence[str] | None = None) -> list[Run]:
    """All runs of a seed; those in the folder are read."""
    checkpoint, states = trained(problem, seed, folder)
    found = []
    for name, arguments in methods(states[:-1]).items():
        file = folder / f"{problem}_{name}_{seed}.json".replace(" ", "-")
        if not file.exists():
            if names is not None and name not in names:
                continue
            file.write_text(json.dumps(asdict(one_run(problem, seed, checkpoint, name, arguments))))
        found.append(Run(**json.loads(file.read_text())))
    return found


def one_run(problem: str, seed: int, checkpoint: Path, name: str, arguments: Mapping[str, Any]) -> Run:
    """One repair of the trained network, through a Trainer."""
    with TemporaryDirectory() as files:
        report = repair(
            quiet(),
            DigitCNN(),
            datamodule=WeakDigit(seed, PROBLEMS[problem]),
            ckpt_path=checkpoint,
            target=Target.label(WEAK),
            unseen="test",
            seed=seed,
            verbose=False,
            dirpath=files,
            **arguments,
        )
    known, unseen = report.pooled("known").counts, report.pooled("unseen").counts
    seconds, note = cost_of(report)
    return Run(
        name,
        seed,
        known.targeted,
        known.kept + known.broken,
        known.repaired_in_target,
        known.broken,
        unseen.repaired,
        unseen.broken,
        unseen.accuracy_before,
        unseen.accuracy_after,
        seconds,
        note,
    )


def cost_of(report: RepairReport) -> tuple[float, str]:
    """Seconds without collecting and judging, and what the last step says of itself."""
    seconds = sum(spent for stage, spent in report.seconds.items() if stage not in ("collect", "judge"))
    return seconds, report.steps[-1].note if report.steps else report.reason


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % t interval of a mean."""
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float], digits: int = 1) -> str:
    """Mean and half of its 95 % t interval."""
    if len(values) < 2:
        return f"{fmean(values):.{digits}f}"
    return f"{fmean(values):.{digits}f} ± {half_interval(values):.{digits}f}"


def table(runs: Sequence[Run], title: str) -> Table:
    """A row for each method, with means over seeds."""
    shown = Table(title=title)
    columns: dict[str, Callable[[Run], float]] = {
        "repaired": lambda one: one.repaired,
        "known broken": lambda one: one.broken,
        "unseen repaired": lambda one: one.unseen_repaired,
        "unseen broken": lambda one: one.unseen_broken,
        "unseen right, points": lambda one: 100 * (one.right - one.right_before),
        "seconds": lambda one: one.seconds,
    }
    for column in ("", "runs", *columns):
        shown.add_column(column, justify="right" if column else "left")
    for method in dict.fromkeys(one.method for one in runs):
        own = [one for one in runs if one.method == method]
        digits = {"unseen right, points": 2}
        cells = (interval([f(one) for one in own], digits.get(name, 1)) for name, f in columns.items())
        shown.add_row(method, str(len(own)), *cells)
    first = [one for one in runs if one.method == runs[0].method]
    before, targets, passed = (fmean(getattr(one, x) for one in first) for x in ("right_before", "targets", "passed"))
    shown.caption = (
        f"Untouched: {before:.1%} of unseen samples right; {targets:.0f} targets, {passed:,.0f} known samples right. "
        "Means with 95 % t intervals."
    )
    return shown


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="weak-digit")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--methods", nargs="+", help="rows to run; all if there are none")
    parser.add_argument("--out", type=Path, default=Path("runs/published"), help="folder of what was run")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    chosen.out.mkdir(parents=True, exist_ok=True)
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    runs = [one for seed in seeds for one in run(chosen.problem, seed, chosen.out, chosen.methods)]
    print(table(runs, f"{chosen.problem}, eights"))
