"""The Lightning that tests use: `NRL_LIGHTNING=lightning.pytorch python -m pytest ...` runs them
under the other.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

NAME = os.environ.get("NRL_LIGHTNING", "pytorch_lightning")
OTHER = {"pytorch_lightning": "lightning.pytorch", "lightning.pytorch": "pytorch_lightning"}[NAME]

pl = import_module(NAME)
cli, callbacks, loggers, states = (
    import_module(f"{NAME}.{part}") for part in ("cli", "callbacks", "loggers", "trainer.states")
)
boring_classes = import_module(f"{NAME}.demos.boring_classes")

LightningDataModule, LightningModule, Trainer, seed_everything = (
    pl.LightningDataModule,
    pl.LightningModule,
    pl.Trainer,
    pl.seed_everything,
)
Callback, EarlyStopping, LearningRateFinder = (
    callbacks.Callback,
    callbacks.EarlyStopping,
    callbacks.LearningRateFinder,
)
ModelCheckpoint, ModelPruning = callbacks.ModelCheckpoint, callbacks.ModelPruning
ProgressBar, RichProgressBar, TQDMProgressBar = (
    callbacks.ProgressBar,
    callbacks.RichProgressBar,
    callbacks.TQDMProgressBar,
)
CSVLogger, Logger, TensorBoardLogger = loggers.CSVLogger, loggers.Logger, loggers.TensorBoardLogger
DummyLogger = loggers.logger.DummyLogger
BoringModel, RandomDataset = boring_classes.BoringModel, boring_classes.RandomDataset
LightningCLI = cli.LightningCLI
RunningStage = states.RunningStage
AsyncCheckpointIO = pl.plugins.io.AsyncCheckpointIO
SingleDeviceStrategy = pl.strategies.SingleDeviceStrategy
CombinedLoader = pl.utilities.CombinedLoader
rank_zero_only = pl.utilities.rank_zero.rank_zero_only
DistributedSamplerWrapper = pl.trainer.connectors.data_connector.DistributedSamplerWrapper


def quiet_trainer(**arguments: Any) -> Any:
    """A trainer on the CPU that shows and saves nothing by itself."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(defaults | arguments))
