"""Helpers of all examples: command line, a quiet trainer, data loaders, and a table of counts."""

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
from lightning_nrl.records import SliceReport, SplitReport

FAST = "run in a few seconds, with less data, fewer epochs and less time for the repair"


def start(description: str, **arguments: dict[str, Any]) -> argparse.Namespace:
    """Parses the command line, which always has `--fast`.

    Silences logs and warnings of other packages.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help=FAST)
    for name, options in arguments.items():
        parser.add_argument(name, **options)
    given = parser.parse_args()
    torch.set_num_threads(1)  # faster for networks this small
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|pytorch_lightning|torch")
    return given


def quiet_trainer(epochs: int = 1, *callbacks: Callback, **arguments: Any) -> Trainer:
    """Returns a trainer on the CPU without progress bar, logger and checkpoints."""
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "callbacks": list(callbacks),
            **quiet,
            **arguments,
        }
    )


class Splits(LightningDataModule):
    """Loaders of the splits in `self.data`.

    `repair_dataloader` has data collected after the training.
    """

    data: dict[str, Dataset]
    batch_size, drop_last = 32, False

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.data["train"], self.batch_size, shuffle=True, drop_last=self.drop_last
        )

    def repair_dataloader(self) -> DataLoader:
        return DataLoader(self.data["repair"], 256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.data["test"], 256)


def summary(**reports: RepairReport) -> Table:
    """Tabulates the counts on known and on unseen data, two rows per repair."""
    rows = {
        f"{name.replace('_', ' ')}, {role}" if len(reports) > 1 else role: report.pooled(role)
        for name, report in reports.items()
        for role in ("known", "unseen")
    }
    return counts_table(rows)


def counts_table(rows: Mapping[str, SplitReport | SliceReport]) -> Table:
    """Tabulates repaired and broken samples and both accuracies, a row per split or slice."""
    table = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        caption="target: failures to repair. known: data used by the repair. "
        "unseen: data that is only counted.",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    heads = (
        "\nsamples",
        "in the\ntarget",
        "repaired\nof these",
        "\nof all",
        "\nbroken",
        "accuracy\nbefore",
        "\nnow",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for name, split in rows.items():
        counts = (split.n, split.targeted, split.repaired_in_target, split.repaired, split.broken)
        shares = (f"{share:.2%}" for share in (split.accuracy_before, split.accuracy_after))
        table.add_row(name, *(f"{count:,}" for count in counts), *shares)
    return table
