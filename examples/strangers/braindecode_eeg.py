"""A braindecode network in the Lightning module of braindecode's own tutorial: no `forward`, no validation."""

from __future__ import annotations

import logging

import numpy as np
import pytorch_lightning as L
import torch
from braindecode.datasets import create_from_X_y
from braindecode.models import ShallowFBCSPNet
from torch.utils.data import DataLoader
from uses import Project, main

from lightning_nrl import DataOptions

N_CHANS, N_TIMES, SFREQ = 8, 200, 100


class LitModule(L.LightningModule):
    """The tutorial's module."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.loss = torch.nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        y_hat = self.module(x)
        loss = self.loss(y_hat, y)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        x, y, _ = batch
        y_hat = self.module(x)
        loss = self.loss(y_hat, y)
        accuracy = (y_hat.argmax(1) == y).float().mean()
        self.log_dict({"test_acc": accuracy, "test_loss": loss})

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)
        return [optimizer], [scheduler]


class Validated(LitModule):
    """What the tutorial leaves out: failures come from validation."""

    def validation_step(self, batch, batch_idx):
        self.test_step(batch, batch_idx)


def adapter(module, batch):
    x, y, _ = batch
    return module.module(x), y


def trials(n: int, seed: int):
    """Noise in eight channels; the class is the rhythm (9, 11 or 13 Hz) that two of them share."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 3, n)
    times = np.arange(N_TIMES) / SFREQ
    signals = chance.normal(0, 1, (n, N_CHANS, N_TIMES))
    rhythm = np.sin(2 * np.pi * (9 + 2 * labels)[:, None] * times + chance.uniform(0, 6.28, (n, 1)))
    signals[:, :2] += 0.4 * rhythm[:, None]
    signals = signals.astype("float32")
    return create_from_X_y(signals, labels, drop_last_window=False, sfreq=SFREQ, window_size_samples=N_TIMES)


def project() -> Project:
    logging.getLogger("mne").setLevel(logging.ERROR)
    train, val = trials(400, 0), trials(200, 1)
    return Project(
        package="braindecode",
        lightning=L,
        make_module=lambda: Validated(ShallowFBCSPNet(N_CHANS, 3, n_times=N_TIMES)),
        make_data=lambda: (DataLoader(train, 50, shuffle=True), DataLoader(val, 50)),
        metric="test_acc",
        epochs=6,
        options={"data": DataOptions(adapter=adapter)},
        counting={"adapter": adapter},
    )


if __name__ == "__main__":
    main(__doc__, project)
