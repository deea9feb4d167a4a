"""Networks in use that are to be replaced, each with the data that came in since it was trained.

Vehicles: an experiment of the paper. Fashion: garments that were rarely upside down in training and often are in
operation, from Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from network import EPOCHS, Drifting, Vehicles, trained
from torch.utils.data import ConcatDataset, DataLoader, Subset

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from fashion_mnist import DriftingFashion

RUNS = Path("runs")


@dataclass(frozen=True)
class InUse:
    """A network in use, and all that its update needs.

    Attributes:
        name: of its updates' folders.
        data: how a new network is made; `train`, which it has seen, `repair`, which came in since, and `test`.
        path: of its checkpoint.
        seed: of data and training.
        epochs: of its training, and of that of an update.
    """

    name: str
    data: Drifting
    path: Path
    seed: int
    epochs: int

    def checkpoint(self) -> Path:
        """The trained network; it is trained if it is not there yet."""
        return trained(self.data, self.path, self.seed, self.epochs)

    def load(self, path: Path) -> LightningModule:
        """A trained network: this one, or an update of it."""
        return type(self.data.network()).load_from_checkpoint(path, map_location="cpu")

    def folder(self, update: str) -> Path:
        """Where an update is kept."""
        words = update.replace(",", "").replace(" ", "_")
        return RUNS / f"update_{self.name}_{words}" / f"seed_{self.seed}"

    def everything(self) -> DataLoader:
        """Batches to train an update on: the old data and those that came in since."""
        return DataLoader(self._everything(), 128, shuffle=True, drop_last=True)

    def known(self) -> DataLoader:
        """The same in order, as they are."""
        return DataLoader(self._everything(), 512)

    def _everything(self) -> ConcatDataset:
        return ConcatDataset([self.data.data["train"], self.data.data["repair"]])

    def quarters(self) -> tuple[Subset, Subset]:
        """A quarter of the test data to calibrate on, and the rest, which stays unseen."""
        test = self.data.data["test"]
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return Subset(test, order[: len(order) // 4]), Subset(test, order[len(order) // 4 :])


def vehicles(seed: int, epochs: int = EPOCHS, experiment: str = "C") -> InUse:
    short = _short(epochs, EPOCHS)
    path = RUNS / f"vehicles_{experiment}_{seed}{short}.ckpt"
    return InUse(f"{experiment}{short}", Vehicles(experiment, seed), path, seed, epochs)


def fashion(seed: int, epochs: int = 10) -> InUse:
    short = _short(epochs, 10)
    return InUse(f"fashion{short}", DriftingFashion(seed), RUNS / f"fashion_{seed}{short}.ckpt", seed, epochs)


def _short(epochs: int, usual: int) -> str:
    """What the names of files say of another number of epochs, so that they are not taken for the usual ones."""
    return "" if epochs == usual else f"_{epochs}_epochs"


DATA: dict[str, Callable[..., InUse]] = {"vehicles": vehicles, "fashion": fashion}
