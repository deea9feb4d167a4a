"""Repairs a regression network on a table of diamonds: a price within 15 % is right.

    python -m pip install plotnine
    python examples/tabular.py

The package plotnine contains 53,940 diamonds with prices, so nothing is downloaded. The network was
trained with hardly any stones of 1.5 carat or more. In later data, three in ten stones are that
large. The network predicts the logarithm of the price, so a tolerance of log(1.15) means 15 % at
any price.
"""

from __future__ import annotations

import csv
import math
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, seed_everything
from output import Splits, quiet_trainer, start, summary
from rich import print
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_nrl import RegressionFreeRepair, Target
from lightning_nrl.tasks import Regression

GRADES = {
    "cut": ("Fair", "Good", "Very Good", "Premium", "Ideal"),
    "color": ("J", "I", "H", "G", "F", "E", "D"),
    "clarity": ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"),
}
LENGTHS = ("carat", "depth", "table", "x", "y", "z")
LARGE = 1.5  # carat
SPLITS = {
    "train": (4_000, 0.002),
    "repair": (1_500, 0.3),
    "test": (3_000, 0.3),
}  # stones, share of large stones


def table() -> tuple[Tensor, Tensor, Tensor]:
    """Returns features, logarithms of prices and a mask of large stones."""
    package = find_spec("plotnine")
    if package is None or package.origin is None:
        raise SystemExit("The data come with plotnine: python -m pip install plotnine")
    with (Path(package.origin).parent / "data" / "diamonds.csv").open(newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if min(float(row[name]) for name in LENGTHS) > 0
        ]
    numbers = torch.tensor([[float(row[name]) for name in LENGTHS] for row in rows])
    numbers[:, [0, 3, 4, 5]] = numbers[:, [0, 3, 4, 5]].log()
    grades = torch.tensor(
        [[float(GRADES[name].index(row[name])) for name in GRADES] for row in rows]
    )
    prices = torch.tensor([math.log(float(row["price"])) for row in rows])
    return (
        torch.cat([numbers, grades], 1),
        prices,
        torch.tensor([float(row["carat"]) >= LARGE for row in rows]),
    )


class Diamonds(Splits):
    """Batches of `(features, log price, large)`. Splits do not overlap."""

    batch_size = 64

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        features, prices, large = table()
        order = torch.randperm(len(prices), generator=torch.Generator().manual_seed(seed))
        pools = {True: order[large[order]], False: order[~large[order]]}
        rows: dict[str, Tensor] = {}
        for split, (n, share) in SPLITS.items():
            taken = {True: round(n * share), False: n - round(n * share)}
            rows[split] = torch.cat([pools[kind][:count] for kind, count in taken.items()])
            pools = {kind: pools[kind][count:] for kind, count in taken.items()}
        known = features[rows["train"]]
        features = (features - known.mean(0)) / known.std(0)
        self.data = {
            name: TensorDataset(features[at], prices[at], large[at]) for name, at in rows.items()
        }


class PriceNet(LightningModule):
    """Three Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.price = nn.Linear(64, 1)
        nn.init.constant_(self.price.bias, 7.8)  # about the mean of the targets

    def forward(self, features: Tensor) -> Tensor:
        return self.price(self.body(features))[:, 0]

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        features, prices, _ = batch
        return F.smooth_l1_loss(self(features), prices, beta=0.1)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


if __name__ == "__main__":
    fast = start(__doc__).fast
    seed_everything(0, verbose=False)
    repair = RegressionFreeRepair(
        task=Regression(tolerance=math.log(1.15)),
        target=Target.where(lambda batch: batch[2], name="large"),
        unseen="test",
        max_time=3 if fast else None,
        verbose=False,
    )
    quiet_trainer(3 if fast else 15, repair).fit(PriceNet(), datamodule=Diamonds())
    print(summary(repair=repair.report))
