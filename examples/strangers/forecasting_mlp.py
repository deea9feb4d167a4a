"""pytorch-forecasting's DecoderMLP: numbers within a tolerance, and its own data set with its own loader.

Its validation logs errors only; forecasts within the tolerance are counted again on what the module's `predict` gives.
The checkpoint holds objects (encoders and normalisers of the data set).
"""

from __future__ import annotations

import lightning.pytorch as L
import numpy as np
import pandas
import torch
from pytorch_forecasting import DecoderMLP, TimeSeriesDataSet
from pytorch_forecasting.data import TorchNormalizer
from pytorch_forecasting.metrics import MAE
from uses import Project, main

from lightning_nrl import DataOptions
from lightning_nrl.tasks import Regression

TOLERANCE, HORIZON = 0.8, 4


def adapter(module, batch):
    x, (y, _) = batch
    return module(x).prediction[..., 0], y


def series(n: int, seed: int) -> pandas.DataFrame:
    """Sales that follow two numbers that are known ahead, with noise."""
    chance = np.random.default_rng(seed)
    price, weather = chance.normal(0, 1, (2, n, 24))
    value = np.sin(2 * price) + 0.5 * weather * price + chance.normal(0, 0.1, price.shape)
    frame = {"series": np.repeat(np.arange(n), 24), "time": np.tile(np.arange(24), n)}
    columns = {"price": price.ravel(), "weather": weather.ravel(), "value": value.ravel()}
    return pandas.DataFrame({**frame, **columns}).astype({"series": str})


def within(trainer: L.Trainer, module: DecoderMLP, data: dict) -> int:
    loader = data["val_dataloaders"]
    predicted = module.predict(loader, trainer_kwargs={"accelerator": "cpu", "logger": False}).cpu()
    truth = torch.cat([y for _, (y, _) in loader])
    return int(((predicted - truth).abs() < TOLERANCE).all(1).sum())


def project() -> Project:
    names = {"time_idx": "time", "target": "value", "group_ids": ["series"]}
    lengths = {"max_encoder_length": 12, "max_prediction_length": HORIZON, "min_prediction_length": HORIZON}
    reals = {"time_varying_known_reals": ["price", "weather"], "time_varying_unknown_reals": ["value"]}
    train = TimeSeriesDataSet(series(40, 0), **names, **lengths, **reals, target_normalizer=TorchNormalizer())
    val = TimeSeriesDataSet.from_dataset(train, series(25, 1))
    return Project(
        package="pytorch_forecasting",
        lightning=L,
        make_module=lambda: DecoderMLP.from_dataset(train, hidden_size=32, learning_rate=0.01, loss=MAE()),
        make_data=lambda: (train.to_dataloader(train=True, batch_size=50), val.to_dataloader(False, batch_size=50)),
        n_validated=len(val),
        options={"task": Regression(tolerance=TOLERANCE), "data": DataOptions(adapter=adapter)},
        counting={"task": Regression(tolerance=TOLERANCE), "adapter": adapter},
        epochs=10,
        weights_only=False,
        count=within,
    )


if __name__ == "__main__":
    main(__doc__, project)
