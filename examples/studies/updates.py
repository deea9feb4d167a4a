"""Compares ways to update a network by the samples that each breaks.

    python examples/studies/updates.py --seeds 10   # vehicles C
    python examples/studies/updates.py --problem fashion --seeds 10   # Fashion-MNIST with drift
    python examples/studies/updates.py --problem fashion-growth --seeds 3   # and with more data
    python examples/studies/updates.py --updates "from scratch"

The old network has seen few front and back views, few upside-down garments, or few data. The new
one is trained on all data, from scratch or from the old weights, with or without a loss term: focal
distillation keeps it right where the old one is, distillation keeps it near all outputs of the old
one, smoothing keeps its outputs small. A repair then fixes its regressions. Networks that started
from the old weights are also interpolated with them, by a strength chosen on a quarter of the test
data, and repaired again. `repaired` repairs the old network on all data instead of an update.
Counts are of the rest of the test data. Earlier runs are read from `runs/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from problems import PROBLEMS, RUNS, markdown, quiet_trainer, start, trained
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_nrl import DataOptions, PositiveCongruentTraining, RepairReport, repair
from lightning_nrl.tasks import Task
from lightning_nrl.updates import FocalDistillation, choose_interpolation, interpolate
from lightning_nrl.updates.loss_terms import OldAnswers, Term

UPDATES = (
    "from scratch",
    "from scratch, congruent",
    "from the old weights",
    "from the old weights, congruent",
    "from scratch, distilled",
    "from scratch, smoothed",
    "repaired",
)
BETWEEN = (0.9, 0.8, 0.7)
"""Strengths that are shown in addition to the chosen one."""


class Smoothing(Term):
    """Label smoothing of 0.1, as a term beside the module's own loss."""

    name = "smoothing"

    def __call__(self, task: Task, output: Tensor, target: Any, old: OldAnswers) -> Tensor:
        return -output.log_softmax(1).mean(1) / 9


TERMS = {
    "congruent": FocalDistillation(),
    "distilled": FocalDistillation(base=1.0, focus=0.0),
    "smoothed": Smoothing(),
}
"""Loss terms by the last word of an update."""

Row = tuple[float, ...]
"""Accuracy, repaired and broken relative to the old model, unseen samples, known broken, repair
seconds.
"""


@dataclass(frozen=True)
class InUse:
    """An old network, and all that its update needs."""

    problem: str
    seed: int
    epochs: int

    @cached_property
    def data(self) -> dict:
        return PROBLEMS[self.problem].data(self.seed).data

    @cached_property
    def checkpoint(self) -> Path:
        return trained(self.problem, self.seed, self.epochs)[0]

    def load(self, path: Path) -> LightningModule:
        return PROBLEMS[self.problem].network.load_from_checkpoint(path, map_location="cpu")

    def folder(self, update: str) -> Path:
        short = "" if self.epochs == PROBLEMS[self.problem].epochs else f"_{self.epochs}_epochs"
        words = (
            f"{self.problem}{short}_{update}".replace(",", "").replace(" ", "_").replace("-", "_")
        )
        return RUNS / f"update_{words}" / f"seed_{self.seed}"

    @cached_property
    def everything(self) -> ConcatDataset:
        """Returns the old and the later data."""
        return ConcatDataset([self.data["train"], self.data["repair"]])

    @cached_property
    def quarters(self) -> tuple[Subset, Subset]:
        """Splits test data: a quarter to choose the strength, and the rest as unseen data."""
        test = self.data["test"]
        order = torch.randperm(
            len(test), generator=torch.Generator().manual_seed(self.seed)
        ).tolist()
        return Subset(test, order[: len(order) // 4]), Subset(test, order[len(order) // 4 :])


def updated(update: str, in_use: InUse) -> dict[str, Row]:
    """Runs one update; returns rows for the trained, the repaired and the interpolated model."""
    folder, old = in_use.folder(update), in_use.load(in_use.checkpoint)
    if update == "repaired":
        return {update: _repaired(folder, old, in_use)}
    if not (folder / "update.ckpt").exists():
        if not (folder / "trained.ckpt").exists():
            _train(update, old, in_use)
        _repair(folder, in_use.load(folder / "trained.ckpt"), in_use, in_use.checkpoint)
    new = in_use.load(folder / "update.ckpt")
    rows = _rows(update, folder)
    if not update.startswith("from the old weights"):
        return rows
    known = DataLoader(in_use.everything, 512)
    for strength in BETWEEN:
        between = deepcopy(new)
        between.load_state_dict(interpolate(old, new, strength, known))
        rows[f"{update}, interpolated {strength}"] = _against(old, between, in_use.quarters[1])
    if not (folder / "interpolated" / "update.ckpt").exists():
        between = deepcopy(new)
        choice = choose_interpolation(old, new, DataLoader(in_use.quarters[0], 512), known)
        choice.write(between)
        _repair(folder / "interpolated", between, in_use, in_use.checkpoint)
    return rows | _rows(f"{update}, interpolated", folder / "interpolated")


def _train(update: str, old: LightningModule, in_use: InUse) -> None:
    seed_everything(in_use.seed + 1000, verbose=False)
    new = (
        deepcopy(old)
        if update.startswith("from the old weights")
        else PROBLEMS[in_use.problem].network()
    )
    callbacks = [
        PositiveCongruentTraining(in_use.checkpoint, term)
        for name, term in TERMS.items()
        if update.endswith(name)
    ]
    trainer = quiet_trainer(in_use.epochs, *callbacks)
    trainer.fit(new, DataLoader(in_use.everything, 128, shuffle=True, drop_last=True))
    trainer.save_checkpoint(in_use.folder(update) / "trained.ckpt")


def _repaired(folder: Path, old: LightningModule, in_use: InUse) -> Row:
    """Returns the row of the old network, repaired on all data."""
    if not (folder / "update.ckpt").exists():
        _repair(folder, deepcopy(old), in_use, None)
    report = RepairReport.from_json((folder / "report.json").read_text())
    row = _against(old, in_use.load(folder / "update.ckpt"), in_use.quarters[1])
    broken = report.pooled("known").counts.broken
    return (*row[:4], broken, sum(report.seconds.values()))


def _repair(folder: Path, model: LightningModule, in_use: InUse, reference: Path | None) -> None:
    """Repairs the regressions of an update, or all failures, and saves model and report."""
    trainer = quiet_trainer(1 if reference else in_use.epochs)
    passed, failed = (DataLoader(in_use.data[split], 128) for split in ("train", "repair"))
    repair(
        trainer,
        model,
        DataLoader(in_use.everything, 128, shuffle=True, drop_last=True),
        reference=reference,
        data=DataOptions(passed=passed, failed=failed),
        unseen=DataLoader(in_use.quarters[1], 128),
        seed=in_use.seed,
        dirpath=folder,
        verbose=False,
    )
    trainer.save_checkpoint(folder / "update.ckpt")


def _rows(name: str, folder: Path) -> dict[str, Row]:
    """Returns rows for a model before and after its repair."""
    report, rows = RepairReport.from_json((folder / "report.json").read_text()), {}
    for row, which in ((name, "trained"), (f"{name}, repaired", "final")):
        known, unseen = (getattr(report.pooled_update(role), which) for role in ("known", "unseen"))
        seconds = sum(report.seconds.values()) if which == "final" else float("nan")
        rows[row] = (
            unseen.accuracy_after,
            unseen.repaired,
            unseen.broken,
            unseen.n,
            known.broken,
            seconds,
        )
    return rows


@torch.no_grad()
def _against(old: LightningModule, new: LightningModule, data: Subset) -> Row:
    """Returns the row of an unrepaired model on unseen data, with empty last columns."""
    batches = [(images, labels) for images, labels, *_ in DataLoader(data, 512)]
    was, now = (torch.cat([m.eval()(x).argmax(1) == y for x, y in batches]) for m in (old, new))
    counts = int((~was & now).sum()), int((was & ~now).sum())
    return (float(now.float().mean()), *counts, len(now), float("nan"), float("nan"))


def table_of(rows: Sequence[dict[str, Row]]) -> str:
    """Tabulates means over seeds, a row per model.

    Counts are of unseen data, except known broken.
    """
    lines = []
    for name in rows[0]:
        accuracy, repaired, broken, n, *rest = map(
            fmean, zip(*(row[name] for row in rows), strict=True)
        )
        cells = (f"{accuracy:.4f}", f"{repaired:.1f}", f"{broken:.1f}", f"{100 * broken / n:.2f}")
        lines.append([name, *cells, *("" if value != value else f"{value:.1f}" for value in rest)])
    return markdown(("accuracy", "repaired", "broken", "NFR, %", "known broken", "seconds"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = [name for name in PROBLEMS if name.startswith(("vehicles", "fashion"))]
    parser.add_argument("--problem", choices=choices, default="vehicles-C")
    parser.add_argument(
        "--seeds", type=int, default=10, help="number of seeds, starting at --first"
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--updates", nargs="+", choices=UPDATES, default=UPDATES)
    parser.add_argument(
        "--epochs", type=int, help="epochs of each training; default: those of the problem"
    )
    chosen = parser.parse_args()
    start()
    rows = []
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        in_use = InUse(chosen.problem, seed, chosen.epochs or PROBLEMS[chosen.problem].epochs)
        rows.append({})
        for update in chosen.updates:
            rows[-1] |= updated(update, in_use)
    print(
        f"Updates, means of {len(rows)} seeds, on unseen samples, "
        "against the model that is replaced\n"
    )
    print(table_of(rows))


if __name__ == "__main__":
    main()
