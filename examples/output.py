"""What all examples share: a quiet start, a quiet trainer, loaders, and a small table of what a repair did."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from rich import box
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from lightning_nrl import RepairReport
from lightning_nrl.report import SliceReport, SplitReport

FAST = "the same in a few seconds: less data, fewer epochs, less time for the repair"


def start(description: str, **arguments: dict[str, Any]) -> argparse.Namespace:
    """Reads the command line, which `--fast` is always part of, and leaves the screen to what an example prints."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help=FAST)
    for name, options in arguments.items():
        parser.add_argument(name, **options)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the networks are so small that threads only wait for each other
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|pytorch_lightning|torch")
    return given


def quiet_trainer(epochs: int = 1, *callbacks: Callback, **arguments: Any) -> Trainer:
    """A trainer on the CPU that shows no progress and writes no log."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"max_epochs": epochs, "accelerator": "cpu", "callbacks": list(callbacks), **quiet, **arguments})


class Splits(LightningDataModule):
    """Loaders of `self.data`; `repair_dataloader` gives what came in after the network was trained."""

    data: dict[str, Dataset]
    batch_size, drop_last = 32, False

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data["train"], self.batch_size, shuffle=True, drop_last=self.drop_last)

    def repair_dataloader(self) -> DataLoader:
        return DataLoader(self.data["repair"], 256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.data["test"], 256)


def summary(**reports: RepairReport) -> Table:
    """Two lines for each repair, with its name: known samples, which it has looked at, and unseen ones."""
    rows = {
        f"{name.replace('_', ' ')}, {role}" if len(reports) > 1 else role: report.pooled(role)
        for name, report in reports.items()
        for role in ("known", "unseen")
    }
    return counts_table(rows)


def counts_table(rows: Mapping[str, SplitReport | SliceReport]) -> Table:
    """A line for each split or slice by its name: what was repaired, what broke, accuracy before and now."""
    table = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        caption="target: failures that were to be repaired. known: the repair looked at them; unseen: only counted.",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    heads = ("\nsamples", "in the\ntarget", "repaired\nof these", "\nof all", "\nbroken", "accuracy\nbefore", "\nnow")
    for head in heads:
        table.add_column(head, justify="right")
    for name, split in rows.items():
        counts = (split.n, split.targeted, split.repaired_in_target, split.repaired, split.broken)
        shares = (f"{share:.2%}" for share in (split.accuracy_before, split.accuracy_after))
        table.add_row(name, *(f"{count:,}" for count in counts), *shares)
    return table
