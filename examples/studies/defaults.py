"""The default repair of six small problems beside fine-tuning and retraining, or in shares of the fit's time.

    python examples/studies/defaults.py --seeds 5             # 25 minutes on one core
    python examples/studies/defaults.py --seeds 2 --max-times 0.1 0.25 0.5 1 2 --problems "digits, drift"

Each problem of `default_problems.py` has its data, its network and its training from a seed. The repair is a callback
of the training; fine-tuning goes on from the trained weights and retraining begins from scratch, both on all known data
with as many epochs as the training. All counts are made by a plain loop. What was run before is read from `--out`.
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
from default_problems import PROBLEMS, SPLITS, Case, Classifier
from lightning.pytorch import Callback, Trainer, seed_everything
from problems import RUNS, markdown, quiet_trainer, start
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lightning_nrl import RegressionFreeRepair, RepairReport
from lightning_nrl.stats import lower_limit, upper_limit


@dataclass(frozen=True)
class Run:
    """What one method did to a trained network.

    Attributes:
        targeted: failures of the repair data.
        repaired: those of them that are right now.
        known_broken: samples of training and repair data that were right and are wrong now.
        unseen_repaired: test samples that were wrong and are right now.
        unseen_broken: test samples that were right and are wrong now.
        unseen_right: test samples that were right before.
        unseen: all test samples.
        seconds: of the method, of the processor: on a busy machine nearer to those of a quiet one than the clock's.
        fit: seconds of the fit before it.
        held_out: what the rung that was taken did to held-out samples: how many it repaired, of how many failures, and
            how many it broke, of how many that passed.
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
    held_out: tuple[int, int, int, int] | None = None

    @property
    def points(self) -> float:
        """By how much the accuracy on test data grew, in percentage points."""
        return 100 * (self.unseen_repaired - self.unseen_broken) / self.unseen


class TrainingEnd(Callback):
    """Notes the time at which training ends; what comes after it in the same `fit` is the repair."""

    ended = 0.0

    def on_train_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        self.ended = time.process_time()


class Study:
    """The methods on one trained network."""

    def __init__(self, case: Case, seed: int, folder: Path) -> None:
        self.case, self.seed, self.folder = case, seed, folder
        self.data = case.data(seed)
        model, wall, began = self.new(), time.perf_counter(), time.process_time()
        quiet_trainer(case.epochs, accelerator="cpu").fit(model, datamodule=self.data)
        self.wall, self.fit = time.perf_counter() - wall, time.process_time() - began
        self.state = deepcopy(model.state_dict())

    def new(self) -> Classifier:
        seed_everything(self.seed, verbose=False)
        return self.case.network()

    def run(self, method: str) -> Run:
        """A method: `fine-tuning`, `retraining`, `default`, or the default in a share of the fit's time: `0.5 x`."""
        model, report = self.new(), None
        if method in ("fine-tuning", "retraining"):
            if method == "fine-tuning":
                model.load_state_dict(self.state)
            known = ConcatDataset([self.data.data["train"], self.data.data["repair"]])
            began = time.process_time()
            batches = DataLoader(known, self.data.batch_size, shuffle=True)
            quiet_trainer(self.case.epochs, accelerator="cpu").fit(model, batches)
        else:
            end, limit = TrainingEnd(), None if method == "default" else float(method.rstrip(" x")) * self.wall
            files = self.folder / method.replace(" ", "_")
            repair = RegressionFreeRepair(unseen="test", max_time=limit, seed=self.seed, dirpath=files, verbose=False)
            quiet_trainer(self.case.epochs, end, repair, accelerator="cpu").fit(model, datamodule=self.data)
            began, report = end.ended, repair.report
        return self.counted(model, time.process_time() - began, report)

    def counted(self, model: Classifier, seconds: float, report: RepairReport | None) -> Run:
        """What changed from the trained weights to a model as it is now."""
        old = self.new()
        old.load_state_dict(self.state)
        was, now = ({split: right(one, self.data.data[split]) for split in SPLITS} for one in (old, model))
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


def held_out_of(report: RepairReport) -> tuple[int, int, int, int] | None:
    taken = next((rung for rung in report.rungs if rung.taken), None)
    if taken is None or taken.held_out is None:
        return None
    counts = taken.held_out
    return counts.repaired, counts.repaired + counts.failing, counts.broken, counts.passed


@torch.no_grad()
def right(model: Classifier, data: Dataset) -> Tensor:
    """Which samples a model gets right, in the order of the data."""
    model.eval()
    return torch.cat([model(inputs).argmax(1) == labels for inputs, labels in DataLoader(data, 500)])


def runs_of(name: str, seed: int, methods: Sequence[str], out: Path) -> dict[str, Run]:
    """A run of each method; read if they were run before."""
    folder = out / name.replace(",", "").replace(" ", "_") / f"seed_{seed}"
    path = folder / f"{'_'.join(methods).replace(' ', '')}.json"
    if not path.exists():
        study = Study(PROBLEMS[name], seed, folder)
        found = {method: asdict(study.run(method)) for method in methods}
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return {method: Run(**values) for method, values in json.loads(path.read_text()).items()}


HEADS = (
    "targets repaired",
    "known broken, worst",
    "unseen repaired : broken",
    "points, mean (worst)",
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
    """In how many runs the unseen rates are within the 90 % intervals of the estimates from held-out samples."""
    rows = [(run.held_out, run) for run in runs if run.held_out is not None]
    covered = [0, 0]
    for held_out, run in rows:
        happened = (run.unseen_repaired, run.unseen - run.unseen_right), (run.unseen_broken, run.unseen_right)
        for i, (k, n) in enumerate(happened):
            counts = held_out[2 * i : 2 * i + 2]
            covered[i] += lower_limit(*counts) <= k / max(n, 1) <= upper_limit(*counts)
    return (
        f"The unseen rate is within the 90 % interval of the held-out estimate for repaired samples in {covered[0]}, "
        f"for broken ones in {covered[1]} of {len(rows)} runs."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--max-times", nargs="+", type=float, help="shares of the fit's seconds for the repair")
    parser.add_argument("--out", type=Path, default=RUNS / "defaults", help="where runs are kept")
    chosen = parser.parse_args()
    start()
    torch.set_num_threads(1)
    methods = ["fine-tuning", "retraining", "default"]
    if chosen.max_times:
        methods = [f"{share:g} x" for share in chosen.max_times]
    found: dict[str, list[Run]] = {method: [] for method in methods}
    rows = []
    for name in chosen.problems:
        seeds = range(chosen.first, chosen.first + chosen.seeds)
        runs = [runs_of(name, seed, methods, chosen.out) for seed in seeds]
        for method in methods:
            own = [one[method] for one in runs]
            found[method] += own
            rows.append(row(f"{name}, {method}", own))
    rows += [row(f"**all**, {method}", runs) for method, runs in found.items()]
    print(markdown(HEADS, rows))
    if "default" in methods:
        print(f"\n{estimates(found['default'])}")


if __name__ == "__main__":
    main()
