"""Updates of a network in use beside each other: what each breaks of the model that it replaces, one table.

    python examples/case_study/updates.py --seeds 10                   # vehicles
    python examples/case_study/updates.py --data fashion --seeds 10    # Fashion-MNIST with drift
    python examples/case_study/updates.py --updates "from scratch"

The network in use has seen few front and back views, or few garments that are upside down; then more data came in. It
is replaced by one that was trained on all of them, from scratch or from the old weights on, with or without a term in
the loss that holds it to what the old one gets right (focal distillation); what it breaks is repaired right after.
If it began at the old weights, it then goes a share of the way back to them, and is repaired again. The share is chosen
on a quarter of the test data; all counts are of the rest. What was run before is read from `runs/`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from statistics import mean

import torch
from in_use import DATA, InUse
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich import box, print
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_nrl import DataOptions, PositiveCongruentTraining, RepairReport, repair
from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.reference import choose_share, interpolate

UPDATES = ("from scratch", "from scratch, congruent", "from the old weights", "from the old weights, congruent")
BETWEEN = (0.1, 0.2, 0.3)
"""Shares of the old weights that are looked at beside the one that is chosen."""
HEADS = ("accuracy", "repaired", "broken", "NFR, %", "known\nbroken", "seconds")

Row = tuple[float, ...]
"""Accuracy, repaired and broken against the old model, negative flip rate, all unseen; known broken; seconds."""


def updated(update: str, in_use: InUse) -> dict[str, Row]:
    """One update with one seed: rows for the model as it was trained and as it was repaired."""
    folder = in_use.folder(update)
    old = in_use.load(in_use.checkpoint())
    if not (folder / "update.ckpt").exists():
        trained = folder / "trained.ckpt"
        if not trained.exists():
            _train(update, old, in_use)
        _repair(folder, in_use.load(trained), in_use)
    new = in_use.load(folder / "update.ckpt")
    rows = _rows(update, folder)
    if not update.startswith("from the old weights"):
        return rows
    shares = {f"{update}, interpolated {share}": _between(old, new, share, in_use) for share in BETWEEN}
    folder /= "interpolated"
    if not (folder / "update.ckpt").exists():
        _go_back(folder, old, new, in_use)
    return rows | shares | _rows(f"{update}, interpolated", folder)


def _train(update: str, old: LightningModule, in_use: InUse) -> None:
    """Trains the update and saves it."""
    seed_everything(in_use.seed + 1000, verbose=False)
    new = deepcopy(old) if update.startswith("from the old weights") else in_use.data.network()
    congruent = [PositiveCongruentTraining(in_use.checkpoint())] if update.endswith("congruent") else []
    trainer = _trainer(in_use.epochs, *congruent)
    trainer.fit(new, in_use.everything())
    trainer.save_checkpoint(in_use.folder(update) / "trained.ckpt")


def _go_back(folder: Path, old: LightningModule, new: LightningModule, in_use: InUse) -> None:
    """Goes a share of the way back to the old weights, and repairs what is there."""
    between = deepcopy(new)
    choose_share(old, new, DataLoader(in_use.quarters()[0], 512), in_use.known()).write(between)
    _repair(folder, between, in_use)


def _repair(folder: Path, model: LightningModule, in_use: InUse) -> None:
    """Repairs what an update breaks, and saves it with the report."""
    trainer = _trainer(1)
    repair(
        trainer,
        model,
        in_use.everything(),
        reference=in_use.checkpoint(),
        data=DataOptions(
            passed=DataLoader(in_use.data.data["train"], 128), failed=DataLoader(in_use.data.data["repair"], 128)
        ),
        unseen=DataLoader(in_use.quarters()[1], 128),
        seed=in_use.seed,
        dirpath=folder,
        verbose=False,
    )
    trainer.save_checkpoint(folder / "update.ckpt")


def _trainer(epochs: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def table_of(rows: Sequence[dict[str, Row]]) -> Table:
    """One line a model: means over seeds, on unseen data except for the known samples that it breaks."""
    table = Table(title=f"Updates, means of {len(rows)} seeds", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("model")
    for head in HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    update = ""
    for name in rows[0]:
        if name in UPDATES:
            update = name
            table.add_section()
        values = [mean(column) for column in zip(*(row[name] for row in rows), strict=True)]
        cells = (f"{values[0]:.4f}", f"{values[1]:.1f}", f"{values[2]:.1f}", f"{100 * values[3]:.2f}")
        table.add_row(
            name.replace(f"{update}, ", "  "),
            *cells,
            *("-" if value != value else f"{value:.1f}" for value in values[4:]),
        )
    table.caption = "On unseen samples, against the model that is replaced; seconds are those of the repair."
    return table


def _rows(name: str, folder: Path) -> dict[str, Row]:
    """Rows for a model before and after its repair."""
    report = RepairReport.from_json((folder / "report.json").read_text())
    return {name: _row(report, "trained"), f"{name}, repaired": _row(report, "now")}


def _row(report: RepairReport, which: str) -> Row:
    known, unseen = (getattr(report.pooled_update(role), which) for role in ("known", "unseen"))
    seconds = sum(report.seconds.values()) if which == "now" else float("nan")
    counts = (unseen.repaired, unseen.broken, unseen.broken / unseen.n)
    return (unseen.accuracy_after, *counts, known.broken, seconds)


def _between(old: LightningModule, new: LightningModule, share: float, in_use: InUse) -> Row:
    """The row of weights between those of both models, on unseen data."""
    between, unseen = deepcopy(new), in_use.quarters()[1]
    between.load_state_dict(interpolate(old, new, share, in_use.known()))
    return _against(_logits(old, unseen), _logits(between, unseen), _labels(unseen))


def _against(before: Tensor, served: Tensor, labels: Tensor) -> Row:
    """The row of logits that are served in place of others; nothing is repaired, so its last columns are empty."""
    counts = FlipCounts.of(before.argmax(1) == labels, served.argmax(1) == labels)
    n, nothing = counts.n, float("nan")
    return (counts.right / n, counts.repaired, counts.broken, counts.broken / n, nothing, nothing)


@torch.no_grad()
def _logits(model: LightningModule, data: Subset) -> Tensor:
    return torch.cat([model.eval()(images) for images, *_ in DataLoader(data, 512)])


def _labels(data: Subset) -> Tensor:
    return torch.cat([labels for _, labels, *_ in DataLoader(data, 512)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="vehicles")
    parser.add_argument("--experiment", choices="ABC", help="of the vehicles; C if not given")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--updates", nargs="+", choices=UPDATES, default=UPDATES)
    parser.add_argument("--epochs", type=int, help="of each training; 40 for vehicles, 10 for fashion if not given")
    chosen = parser.parse_args()
    if chosen.experiment and chosen.data != "vehicles":
        parser.error(f"`--experiment` is of the vehicles, and --data is {chosen.data}\nHINT: leave one of them out")
    more = {"experiment": chosen.experiment, "epochs": chosen.epochs}
    more = {name: value for name, value in more.items() if value}
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    rows = []
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        in_use = DATA[chosen.data](seed, **more)
        rows.append({})
        for update in chosen.updates:
            rows[-1] |= updated(update, in_use)
        for name, row in rows[-1].items():
            known = "" if row[4] != row[4] else f", {row[4]:.0f} known broken"
            print(f"seed {seed}: {name}: accuracy {row[0]:.4f}, {row[1]:.0f} : {row[2]:.0f}{known}")
    print(table_of(rows))


if __name__ == "__main__":
    main()
