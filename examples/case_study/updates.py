"""Updates of the vehicles' network beside each other: what each breaks of the model that it replaces, one table.

    python examples/case_study/updates.py --seeds 10
    python examples/case_study/updates.py --updates "from scratch"

The network in use has seen few front and back views; then more data came in. It is replaced by one that was trained on
all of them, from scratch or from the old weights on, with or without a term in the loss that holds it to what the old
one gets right (focal distillation); what this one breaks is repaired right after the training.
Then old and new are served together: behind a margin switch, or as an ensemble, with a threshold and a weight that are
chosen on a quarter of the test data; all counts are of the rest. What was run before is read from `runs/`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from network import EPOCHS, VehicleNet, Vehicles, trained
from pytorch_lightning import Callback, Trainer, seed_everything
from rich import box, print
from rich.table import Table
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_nrl import PositiveCongruentTraining, RegressionFreeRepair, RepairReport
from lightning_nrl.flips import FlipCounts
from lightning_nrl.switch import WeightedEnsemble, choose_threshold, choose_weight
from lightning_nrl.switch.rule import SwitchRule

UPDATES = ("from scratch", "from scratch, congruent", "from the old weights", "from the old weights, congruent")
LIMIT = 0.005
"""The share of the calibration samples that the old model gets right and the switch may break."""
SHARES = (0.2, 0.3, 0.4)
"""Weights of the old model in an ensemble that are looked at beside the one that is chosen."""
HEADS = ("accuracy", "repaired", "broken", "NFR, %", "known\nbroken", "seconds")

Row = tuple[float, ...]
"""Accuracy, repaired and broken against the old model, negative flip rate, all unseen; known broken; seconds."""


def updated(update: str, experiment: str, seed: int, epochs: int = EPOCHS) -> dict[str, Row]:
    """One update with one seed: rows for the model as it was trained, as it was repaired, and beside the old one."""
    name = update.replace(",", "").replace(" ", "_")
    folder = Path("runs") / f"update_{experiment}_{name}" / f"seed_{seed}"
    data = Vehicles(experiment, seed)
    checkpoint = trained(data, Path("runs") / f"vehicles_{experiment}_{seed}.ckpt", seed, epochs)
    old, new = VehicleNet.load_from_checkpoint(checkpoint, map_location="cpu"), VehicleNet()
    if not (folder / "update.ckpt").exists():
        seed_everything(seed + 1000, verbose=False)
        if update.startswith("from the old weights"):
            new.load_state_dict(old.state_dict())
        congruent = [PositiveCongruentTraining(checkpoint)] if update.endswith("congruent") else []
        _train(
            new,
            data,
            folder,
            epochs,
            *congruent,
            RegressionFreeRepair(
                reference=checkpoint,
                passed=DataLoader(data.data["train"], 512),
                failed=data.repair_dataloader(),
                unseen=DataLoader(_quarters(data, seed)[1], 512),
                seed=seed,
                dirpath=folder,
                verbose=False,
            ),
        )
    report = RepairReport.from_json((folder / "report.json").read_text())
    new = VehicleNet.load_from_checkpoint(folder / "update.ckpt", map_location="cpu")
    rows = {update: _row(report, "trained"), f"{update}, repaired": _row(report, "now")}
    return rows | {f"{update}, {name}": row for name, row in _served(old, new, data, seed).items()}


def _train(model: VehicleNet, data: Vehicles, folder: Path, epochs: int, *callbacks: Callback) -> None:
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    everything = ConcatDataset([data.data["train"], data.data["repair"]])
    trainer.fit(model, DataLoader(everything, 128, shuffle=True, drop_last=True))
    trainer.save_checkpoint(folder / "update.ckpt")


def table_of(rows: Sequence[dict[str, Row]]) -> Table:
    """One line a model: means over seeds, on unseen data except for the known samples that it breaks."""
    table = Table(title=f"Updates, means of {len(rows)} seeds", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("model")
    for head in HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    for name in rows[0]:
        values = [mean(column) for column in zip(*(row[name] for row in rows), strict=True)]
        cells = (f"{values[0]:.4f}", f"{values[1]:.1f}", f"{values[2]:.1f}", f"{100 * values[3]:.2f}")
        table.add_row(name, *cells, *("-" if value != value else f"{value:.1f}" for value in values[4:]))
    table.caption = "On unseen samples, against the model that is replaced; seconds are those of the repair."
    return table


def _row(report: RepairReport, which: str) -> Row:
    known, unseen = (getattr(report.pooled_update(role), which) for role in ("known", "unseen"))
    seconds = sum(report.seconds.values()) if which == "now" else float("nan")
    counts = (unseen.repaired, unseen.broken, unseen.broken / unseen.n)
    return (unseen.accuracy_after, *counts, known.broken, seconds)


def _served(old: VehicleNet, new: VehicleNet, data: Vehicles, seed: int) -> dict[str, Row]:
    """Rows for both models together, on unseen data; what is chosen is chosen on calibration data."""
    chosen, unseen = ((_logits(old, part), _logits(new, part), _labels(part)) for part in _quarters(data, seed))
    switch = SwitchRule(choose_threshold(*chosen, limit=LIMIT).threshold)
    weight = choose_weight(*chosen).weight
    before, after, labels = unseen
    found = {"switch": switch.choose(before, after)}
    for name, share in (("ensemble", weight), *((f"ensemble {share}", share) for share in SHARES)):
        found[name] = WeightedEnsemble(old, new, share).choose(before, after)
    was = before.argmax(1) == labels
    counts = {name: FlipCounts.of(was, served.argmax(1) == labels) for name, served in found.items()}
    nothing = float("nan")
    return {
        name: ((c.kept + c.repaired) / c.n, c.repaired, c.broken, c.broken / c.n, nothing, nothing)
        for name, c in counts.items()
    }


def _quarters(data: Vehicles, seed: int) -> tuple[Subset, Subset]:
    """A quarter of the test data to calibrate on, and the rest, which stays unseen."""
    test = data.data["test"]
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(test, order[: len(order) // 4]), Subset(test, order[len(order) // 4 :])


@torch.no_grad()
def _logits(model: VehicleNet, data: Subset) -> Tensor:
    return torch.cat([model.eval()(images) for images, *_ in DataLoader(data, 512)])


def _labels(data: Subset) -> Tensor:
    return torch.cat([labels for _, labels, *_ in DataLoader(data, 512)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", choices="ABC", default="C")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from seed --first")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--updates", nargs="+", choices=UPDATES, default=UPDATES)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    chosen = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    rows = []
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        rows.append({})
        for update in chosen.updates:
            rows[-1] |= updated(update, chosen.experiment, seed, chosen.epochs)
        for name, row in rows[-1].items():
            print(f"seed {seed}: {name}: accuracy {row[0]:.4f}, {row[1]:.0f} : {row[2]:.0f}, {row[4]:.0f} known broken")
    print(table_of(rows))
