"""What `TrainingHistory` costs beside the training's own work, in processor time."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning_package import CSVLogger, pl
from measure import ResNet27, milliseconds, show
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nrl.published import TrainingHistory


class Classifier(pl.LightningModule):
    """The least module there is, with a loss that it logs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    layers = (
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
    )
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


class Timed(TrainingHistory):
    """Times each epoch, and the record at its end."""

    spent: list[tuple[float, float]]

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.began = time.thread_time()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        before = time.thread_time()
        super().on_train_epoch_end(trainer, pl_module)
        ended = time.thread_time()
        self.spent.append((ended - before, ended - self.began))


NETWORKS = {
    "27 convolutions, 512 images of 32 x 32": (ResNet27, (3, 32, 32), 512),
    "2 convolutions, 4,096 images of 16 x 16": (cnn, (1, 16, 16), 4096),
    "64 - 32 - 10, 4,096 images of 8 x 8": (mlp, (1, 8, 8), 4096),
}


def history() -> None:
    """An epoch of training and validation in batches of 64, and what a record adds to it; both in
    one epoch.
    """
    warnings.simplefilter("ignore")
    for package in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.ERROR)
    rows = [added(name, splits) for name in NETWORKS for splits in (["train"], ["train", "val"])]
    header = ["network", "splits", "epoch without", "TrainingHistory", "more", "a point on disk"]
    show("An epoch of training and validation, medians of 5 epochs", header, rows)


def added(name: str, splits: list[str]) -> list[str]:
    make, shape, n = NETWORKS[name]
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(n, *shape), torch.randint(0, 7, (n,)))
    few = TensorDataset(*data[: n // 4])
    with tempfile.TemporaryDirectory() as folder:
        timed = Timed(splits=splits, dirpath=Path(folder) / "history")
        timed.spent = []
        logger = CSVLogger(folder, flush_logs_every_n_steps=10**6)
        quiet = dict.fromkeys(
            ("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
        )
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=6, logger=logger, callbacks=[timed], **quiet
        )
        trainer.fit(Classifier(make()), DataLoader(data, 64, shuffle=True), DataLoader(few, 64))
        sizes = [file.stat().st_size for file in (Path(folder) / "history").glob("point-*.pt")]
    own, rest = zip(
        *((own, epoch - own) for own, epoch in timed.spent[1:]), strict=True
    )  # one warm-up
    more = statistics.median(a / b for a, b in zip(own, rest, strict=True))
    times = milliseconds(rest), milliseconds(own), f"{100 * more:.1f} %"
    return [name, " and ".join(splits), *times, f"{sum(sizes) / len(sizes) / 1024:.0f} KiB"]
