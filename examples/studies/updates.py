"""Updates of a network in use beside each other: what each breaks of the model that it replaces, one table.

    python examples/studies/updates.py --seeds 10                          # vehicles C
    python examples/studies/updates.py --problem fashion --seeds 10        # Fashion-MNIST with drift
    python examples/studies/updates.py --updates "from scratch"

The network in use has seen few front and back views, or few garments that are upside down; then more data came in. It
is replaced by one that was trained on all of them, from scratch or from the old weights on, with or without a term in
the loss that holds it to what the old one gets right (focal distillation); what it breaks is repaired right after.
If it began at the old weights, it then goes a share of the way back to them, chosen on a quarter of the test data, and
is repaired again. All counts are of the rest. What was run before is read from `runs/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from lightning.pytorch import LightningModule, seed_everything
from problems import PROBLEMS, RUNS, markdown, quiet_trainer, start, trained
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_nrl import DataOptions, PositiveCongruentTraining, RepairReport, repair
from lightning_nrl.updates import choose_share, interpolate

UPDATES = ("from scratch", "from scratch, congruent", "from the old weights", "from the old weights, congruent")
BETWEEN = (0.1, 0.2, 0.3)
"""Shares of the old weights that are looked at beside the one that is chosen."""

Row = tuple[float, ...]
"""Accuracy, repaired and broken against the old model, unseen samples, known broken, seconds of the repair."""


@dataclass(frozen=True)
class InUse:
    """A network in use, and all that its update needs."""

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
        words = f"{self.problem}{short}_{update}".replace(",", "").replace(" ", "_").replace("-", "_")
        return RUNS / f"update_{words}" / f"seed_{self.seed}"

    @cached_property
    def everything(self) -> ConcatDataset:
        """The old data and those that came in since."""
        return ConcatDataset([self.data["train"], self.data["repair"]])

    @cached_property
    def quarters(self) -> tuple[Subset, Subset]:
        """A quarter of the test data to choose on, and the rest, which stays unseen."""
        test = self.data["test"]
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return Subset(test, order[: len(order) // 4]), Subset(test, order[len(order) // 4 :])


def updated(update: str, in_use: InUse) -> dict[str, Row]:
    """One update with one seed: rows for the model as it was trained, as it was repaired, and between old and new."""
    folder, old = in_use.folder(update), in_use.load(in_use.checkpoint)
    if not (folder / "update.ckpt").exists():
        if not (folder / "trained.ckpt").exists():
            _train(update, old, in_use)
        _repair(folder, in_use.load(folder / "trained.ckpt"), in_use)
    new = in_use.load(folder / "update.ckpt")
    rows = _rows(update, folder)
    if not update.startswith("from the old weights"):
        return rows
    known = DataLoader(in_use.everything, 512)
    for share in BETWEEN:
        between = deepcopy(new)
        between.load_state_dict(interpolate(old, new, share, known))
        rows[f"{update}, interpolated {share}"] = _against(old, between, in_use.quarters[1])
    if not (folder / "interpolated" / "update.ckpt").exists():
        between = deepcopy(new)
        choose_share(old, new, DataLoader(in_use.quarters[0], 512), known).write(between)
        _repair(folder / "interpolated", between, in_use)
    return rows | _rows(f"{update}, interpolated", folder / "interpolated")


def _train(update: str, old: LightningModule, in_use: InUse) -> None:
    seed_everything(in_use.seed + 1000, verbose=False)
    new = deepcopy(old) if update.startswith("from the old weights") else PROBLEMS[in_use.problem].network()
    congruent = [PositiveCongruentTraining(in_use.checkpoint)] if update.endswith("congruent") else []
    trainer = quiet_trainer(in_use.epochs, *congruent)
    trainer.fit(new, DataLoader(in_use.everything, 128, shuffle=True, drop_last=True))
    trainer.save_checkpoint(in_use.folder(update) / "trained.ckpt")


def _repair(folder: Path, model: LightningModule, in_use: InUse) -> None:
    """Repairs what an update breaks, and saves it with the report."""
    trainer = quiet_trainer()
    passed, failed = (DataLoader(in_use.data[split], 128) for split in ("train", "repair"))
    repair(
        trainer,
        model,
        DataLoader(in_use.everything, 128, shuffle=True, drop_last=True),
        reference=in_use.checkpoint,
        data=DataOptions(passed=passed, failed=failed),
        unseen=DataLoader(in_use.quarters[1], 128),
        seed=in_use.seed,
        dirpath=folder,
        verbose=False,
    )
    trainer.save_checkpoint(folder / "update.ckpt")


def _rows(name: str, folder: Path) -> dict[str, Row]:
    """Rows for a model before and after its repair."""
    report, rows = RepairReport.from_json((folder / "report.json").read_text()), {}
    for row, which in ((name, "trained"), (f"{name}, repaired", "now")):
        known, unseen = (getattr(report.pooled_update(role), which) for role in ("known", "unseen"))
        seconds = sum(report.seconds.values()) if which == "now" else float("nan")
        rows[row] = (unseen.accuracy_after, unseen.repaired, unseen.broken, unseen.n, known.broken, seconds)
    return rows


@torch.no_grad()
def _against(old: LightningModule, new: LightningModule, data: Subset) -> Row:
    """The row of a model on unseen data; nothing is repaired, so its last columns are empty."""
    batches = [(images, labels) for images, labels, *_ in DataLoader(data, 512)]
    was, now = (torch.cat([m.eval()(x).argmax(1) == y for x, y in batches]) for m in (old, new))
    counts = int((~was & now).sum()), int((was & ~now).sum())
    return (float(now.float().mean()), *counts, len(now), float("nan"), float("nan"))


def table_of(rows: Sequence[dict[str, Row]]) -> str:
    """A line for each model: means over seeds, on unseen data except for the known samples that it breaks."""
    lines = []
    for name in rows[0]:
        accuracy, repaired, broken, n, *rest = map(fmean, zip(*(row[name] for row in rows), strict=True))
        cells = (f"{accuracy:.4f}", f"{repaired:.1f}", f"{broken:.1f}", f"{100 * broken / n:.2f}")
        lines.append([name, *cells, *("" if value != value else f"{value:.1f}" for value in rest)])
    return markdown(("accuracy", "repaired", "broken", "NFR, %", "known broken", "seconds"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = [name for name in PROBLEMS if name.startswith(("vehicles", "fashion"))]
    parser.add_argument("--problem", choices=choices, default="vehicles-C")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--updates", nargs="+", choices=UPDATES, default=UPDATES)
    parser.add_argument("--epochs", type=int, help="of each training; those of the problem if not given")
    chosen = parser.parse_args()
    start()
    rows = []
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        in_use = InUse(chosen.problem, seed, chosen.epochs or PROBLEMS[chosen.problem].epochs)
        rows.append({})
        for update in chosen.updates:
            rows[-1] |= updated(update, in_use)
    print(f"Updates, means of {len(rows)} seeds, on unseen samples, against the model that is replaced\n")
    print(table_of(rows))


if __name__ == "__main__":
    main()
