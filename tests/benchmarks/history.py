"""What `TrainingHistory` adds to an epoch: processor time of a record and of the rest of the epoch.

Both are taken in one epoch, so that a busy machine slows them alike.
Run with `python tests/benchmarks/history.py`.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from bench import ResNet27, milliseconds, show
from lightning_package import CSVLogger, pl
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl.callbacks import TrainingHistory

EPOCHS = 5


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


NETWORKS: dict[str, tuple[Any, tuple[int, int, int], int, int]] = {
    "27 convolutions, 512 images of 32 x 32, batches of 64": (ResNet27, (3, 32, 32), 512, 64),
    "2 convolutions, 4,096 images of 16 x 16, batches of 64": (cnn, (1, 16, 16), 4096, 64),
    "64 - 32 - 10, 4,096 images of 8 x 8, batches of 64": (mlp, (1, 8, 8), 4096, 64),
}


class Classifier(pl.LightningModule):
    """The least module there is, with a loss that it logs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Timed(TrainingHistory):
    """Takes the processor time of each epoch, and of the record at its end."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.spent: list[tuple[float, float]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.began = time.thread_time()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        before = time.thread_time()
        super().on_train_epoch_end(trainer, pl_module)
        ended = time.thread_time()
        self.spent.append((ended - before, ended - self.began))


def measured(name: str, splits: list[str]) -> list[str]:
    make, shape, n, size = NETWORKS[name]
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(n, *shape), torch.randint(0, 7, (n,)))
    few = TensorDataset(*data[: n // 4])
    with tempfile.TemporaryDirectory() as folder:
        history = Timed(splits=splits, dirpath=Path(folder) / "history")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS + 1,
            logger=CSVLogger(folder, flush_logs_every_n_steps=10**6),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[history],
        )
        trainer.fit(Classifier(make()), DataLoader(data, size, shuffle=True), DataLoader(few, size))
        points = list((Path(folder) / "history").glob("point-*.pt"))
        on_disk = sum(file.stat().st_size for file in points) / len(points)
    spent = history.spent[1:]  # one warm-up
    share = statistics.median(own / (epoch - own) for own, epoch in spent)
    return [
        name,
        " and ".join(splits),
        milliseconds([epoch - own for own, epoch in spent]),
        milliseconds([own for own, _ in spent]),
        f"{100 * share:.1f} %",
        f"{on_disk / 1024:.0f} KiB",
    ]


def main() -> None:
    torch.set_num_threads(1)
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    header = ["network", "splits", "epoch without", "TrainingHistory", "more", "a point on disk"]
    rows = (measured(name, splits) for name in NETWORKS for splits in (["train"], ["train", "val"]))
    show(f"An epoch of training and validation, medians of {EPOCHS} epochs", header, rows)  # row by row


if __name__ == "__main__":
    main()
