"""Compares the default repair with fine-tuning, under time limits, and after other fits.

    python examples/studies/defaults.py --seeds 10   # six small problems, 10 minutes on one core
    python examples/studies/defaults.py --new --seeds 10   # three problems made after the default
    python examples/studies/defaults.py --pretrained --seeds 1   # a pretrained network
    python examples/studies/defaults.py --seeds 2 --max-times 0.1 0.5 2 --problems "digits, drift"
    python examples/studies/defaults.py --seeds 3 --fits   # the quickstart and the weak digit

The repair is a callback of the training; the targets are all failures of the repair data.
Fine-tuning starts from the trained weights and trains on all known data for as many epochs as the
training of the default is planned for (those of the fit, but at least 16 on small data), and for
twice as many. `--fits` replaces the fit before the repair by shorter or other ones
(`FITS`). A plain loop makes all counts. Earlier runs are read from `--out`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from default_problems import SMALL, SPLITS
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from new_problems import NEW
from pretrained import PRETRAINED
from problems import PROBLEMS, RUNS, Problem, State, markdown, quiet_trainer, start
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lightning_nrl import RegressionFreeRepair, RepairReport, Settings, TensorSource, repair_module
from lightning_nrl.evaluation.stats import interval
from lightning_nrl.methods.budget import LEAST_EPOCHS, SMALL_BUDGET, SMALL_NETWORK

OWNERS = {"quickstart": PROBLEMS["slashed-zeros"], "weak digit": PROBLEMS["weak-digit"]}
"""Networks of `--fits`."""
ALL = {**SMALL, **NEW, **PRETRAINED, **OWNERS}
FITS = {"rate 0": (0.0, None), "one epoch": (None, 1), "rate 1e-4": (1e-4, 3)}
"""Fits that start from the trained weights: a constant rate and the epochs; None: as in the
training.
"""
FINE_TUNINGS = {"fine-tuning": 1, "fine-tuning x 2": 2}
"""Epochs of fine-tuning, as multiples of those of the default's training."""
PLAIN = "plain PyTorch"
SHIFTED = "images, noisy labels"
"""In this problem, known labels are noisy and unseen ones are not, so held-out samples differ from
unseen.
"""


@dataclass(frozen=True)
class Run:
    """Counts of one method on repair data (targets), known and unseen data, and its CPU seconds.

    `held_out`: repaired, failures, broken and passed among the held-out samples of the chosen rung,
    and the number of rungs to choose from.
    """

    targeted: int
    repaired: int
    known_broken: int
    unseen_repaired: int
    unseen_broken: int
    unseen_right: int
    unseen: int
    seconds: float
    fit: float
    held_out: tuple[int, int, int, int, int] | None = None

    @property
    def points(self) -> float:
        """Returns the gain in accuracy on unseen data, in percentage points."""
        return 100 * (self.unseen_repaired - self.unseen_broken) / self.unseen


class TrainingEnd(Callback):
    """Records weights and time at the end of training, before the repair in the same `fit`."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state, self.ended = deepcopy(pl_module.state_dict()), time.process_time()


class Study:
    """The methods on one trained network."""

    def __init__(self, problem: Problem, seed: int, folder: Path) -> None:
        self.problem, self.seed, self.folder = problem, seed, folder
        self.data = problem.data(seed)
        model, wall, began = self.new(), time.perf_counter(), time.process_time()
        quiet_trainer(problem.epochs, accelerator="cpu").fit(model, datamodule=self.data)
        self.wall, self.fit = time.perf_counter() - wall, time.process_time() - began
        self.state = deepcopy(model.state_dict())

    def new(self, state: State | None = None) -> LightningModule:
        seed_everything(self.seed, verbose=False)
        model = self.problem.network()
        model.load_state_dict(model.state_dict() if state is None else state)
        return model

    def run(self, method: str) -> Run:
        """Runs fine-tuning, the default, or the default after a fit.

        `0.5 x` runs the default in half of the fit's time.
        """
        if method in FINE_TUNINGS:
            model = self.new(self.state)
            loader = self.data.train_dataloader()
            known = ConcatDataset([loader.dataset, self.data.data["repair"]])
            batches = DataLoader(known, loader.batch_size, shuffle=True, drop_last=loader.drop_last)
            began = time.process_time()
            size = max(1.0, sum(p.numel() for p in model.parameters()) / SMALL_NETWORK)
            least = min(LEAST_EPOCHS, int(SMALL_BUDGET / (len(known) * size)))
            epochs = FINE_TUNINGS[method] * max(self.problem.epochs, least)
            quiet_trainer(epochs, accelerator="cpu").fit(model, batches)
            return self.counted(self.state, model, time.process_time() - began)
        if method == PLAIN:
            return self.repaired_plain()
        limit = (
            None
            if method == "default" or method in FITS
            else self.wall * float(method.rstrip(" x"))
        )
        rate, epochs = FITS.get(method, (None, None))
        model = self.new(self.state if method in FITS else None)
        if rate is not None:
            fix_rate(model, rate)
        end, files = TrainingEnd(), self.folder / method.replace(" ", "_")
        repair = RegressionFreeRepair(
            unseen="test", max_time=limit, seed=self.seed, dirpath=files, verbose=False
        )
        trainer = quiet_trainer(epochs or self.problem.epochs, end, repair, accelerator="cpu")
        trainer.fit(model, datamodule=self.data)
        return self.counted(end.state, model, time.process_time() - end.ended, repair.report)

    def repaired_plain(self) -> Run:
        """Repairs with tensors as data, without a Trainer."""
        train, repair, test = (self.data.data[split].tensors[:2] for split in SPLITS)
        known = [
            TensorSource(*train, split="train", passed=True),
            TensorSource(*repair, split="repair", failed=True),
        ]
        model, began = self.new(self.state).eval(), time.process_time()
        outcome = repair_module(
            model, known, Settings(seed=self.seed), unseen=[TensorSource(*test, split="test")]
        )
        outcome.write(model)
        return self.counted(self.state, model, time.process_time() - began, outcome.report)

    def counted(
        self,
        before: State,
        model: LightningModule,
        seconds: float,
        report: RepairReport | None = None,
    ) -> Run:
        """Counts the changes from earlier weights to the present ones."""
        models = self.new(before), model
        was, now = (
            {split: right(one, self.data.data[split]) for split in SPLITS} for one in models
        )
        broken = {split: int((was[split] & ~now[split]).sum()) for split in SPLITS}
        return Run(
            targeted=int((~was["repair"]).sum()),
            repaired=int((~was["repair"] & now["repair"]).sum()),
            known_broken=broken["train"] + broken["repair"],
            unseen_repaired=int((~was["test"] & now["test"]).sum()),
            unseen_broken=broken["test"],
            unseen_right=int(was["test"].sum()),
            unseen=len(was["test"]),
            seconds=seconds,
            fit=self.fit,
            held_out=None if report is None else held_out_of(report),
        )


def fix_rate(model: LightningModule, rate: float) -> None:
    """Replaces the schedule of a module by a constant learning rate."""
    configure = model.configure_optimizers

    def constant() -> torch.optim.Optimizer:
        chosen = configure()
        optimizer = chosen["optimizer"] if isinstance(chosen, dict) else chosen
        for group in optimizer.param_groups:
            group["lr"] = rate
        return optimizer

    model.configure_optimizers = constant


def held_out_of(report: RepairReport) -> tuple[int, int, int, int, int] | None:
    counts, choices = report.held_out, report.n_estimates
    return counts and (
        counts.repaired,
        counts.repaired + counts.failing,
        counts.broken,
        counts.passed,
        choices,
    )


@torch.no_grad()
def right(model: LightningModule, data: Dataset) -> Tensor:
    """Returns True for samples that a model gets right, in the order of the data."""
    model.eval()
    return torch.cat(
        [model(inputs).argmax(1) == labels for inputs, labels, *_ in DataLoader(data, 500)]
    )


def runs_of(
    name: str, problem: Problem, seed: int, methods: Sequence[str], out: Path
) -> dict[str, Run]:
    """Runs each method, or reads earlier runs."""
    folder = out / name.replace(",", "").replace(" ", "_") / f"seed_{seed}"
    path = folder / f"{'_'.join(methods).replace(' ', '')}.json"
    if not path.exists():
        study = Study(problem, seed, folder)
        found = {method: asdict(study.run(method)) for method in methods}
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return {method: Run(**values) for method, values in json.loads(path.read_text()).items()}


HEADS = (
    "targets repaired",
    "known broken, worst",
    "unseen repaired : broken",
    "points (worst)",
    "x the fit's time",
)


def row(name: str, runs: Sequence[Run]) -> list[str]:
    gained, lost = sum(run.unseen_repaired for run in runs), sum(run.unseen_broken for run in runs)
    return [
        name,
        f"{sum(run.repaired for run in runs):,} of {sum(run.targeted for run in runs):,}",
        f"{max(run.known_broken for run in runs)}",
        f"{gained:,} : {lost:,}",
        f"{fmean(run.points for run in runs):+.2f} ({min(run.points for run in runs):+.2f})",
        f"{sum(run.seconds for run in runs) / sum(run.fit for run in runs):.1f}",
    ]


def estimates(runs: Sequence[Run]) -> str:
    """Counts the runs whose unseen rates are in the 90 % intervals of their held-out estimates."""
    covered, tried = [0, 0], [run for run in runs if run.held_out is not None]
    for run in tried:
        happened = (
            (run.unseen_repaired, run.unseen - run.unseen_right),
            (run.unseen_broken, run.unseen_right),
        )
        for i, (k, n) in enumerate(happened):
            low, high = interval(*run.held_out[2 * i : 2 * i + 2], run.held_out[-1])
            covered[i] += low <= k / max(n, 1) <= high
    return (
        "The unseen rate is within the 90 % interval of the held-out estimate "
        f"for repaired samples in {covered[0]}, "
        f"for broken ones in {covered[1]} of {len(tried)} runs (all problems but {SHIFTED!r})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, starting at --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--problems", nargs="+", choices=ALL, help="default: all of the study")
    parser.add_argument("--new", action="store_true", help="problems made after the default")
    parser.add_argument("--pretrained", action="store_true", help="a pretrained network")
    parser.add_argument(
        "--max-times", nargs="+", type=float, help="time limits, as shares of the fit's time"
    )
    parser.add_argument("--fits", action="store_true", help="other fits before the repair")
    parser.add_argument("--out", type=Path, default=RUNS / "defaults", help="folder of the runs")
    chosen = parser.parse_args()
    start()
    torch.set_num_threads(1)
    methods = [*FINE_TUNINGS, "default"]
    if chosen.fits:
        methods = ["fine-tuning", "default", *FITS, PLAIN]
    elif chosen.max_times:
        methods = [f"{share:g} x" for share in chosen.max_times]
    found: dict[str, list[Run]] = {method: [] for method in methods}
    rows, alike = [], []
    problems = SMALL
    if chosen.fits:
        problems = OWNERS
    elif chosen.new:
        problems = NEW
    elif chosen.pretrained:
        problems = PRETRAINED
    for name in chosen.problems or problems:
        seeds = range(chosen.first, chosen.first + chosen.seeds)
        runs = [runs_of(name, ALL[name], seed, methods, chosen.out) for seed in seeds]
        for method in methods:
            own = [one[method] for one in runs]
            found[method] += own
            alike += own if name != SHIFTED else []
            rows.append(row(f"{name}, {method}", own))
    rows += [row(f"**all**, {method}", runs) for method, runs in found.items()]
    print(f"{markdown(HEADS, rows)}\n\n{estimates(alike)}")


if __name__ == "__main__":
    main()
