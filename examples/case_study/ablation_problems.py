"""What the ablation of localisers runs on: the weak digit, Fashion-MNIST with drift, and the vehicles A, B and C."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from fashion_mnist import DriftingFashion, FashionNet
from lightning.pytorch import LightningDataModule, LightningModule
from network import VehicleNet, Vehicles
from published import State, train
from repairs import TARGETS
from weak_digit import EPOCHS, WEAK, DigitCNN, WeakDigit

from lightning_nrl import Target, TensorSource
from lightning_nrl.localization import HistoryPoint
from lightning_nrl.localization.history import Known


@dataclass(frozen=True)
class Problem:
    """A network to be trained and repaired, of any seed.

    Attributes:
        data: of a seed, in splits `train`, `repair` and `test`.
        network: makes a new one.
        epochs: of its training.
        target: what is to be repaired.
        layers: the last layer, the one before it that has weights, and a deeper one.
    """

    data: Callable[[int], LightningDataModule]
    network: Callable[[], LightningModule]
    epochs: int
    target: Target
    layers: tuple[str, str, str]

    def sources(self, seed: int) -> tuple[list[TensorSource], TensorSource]:
        """Known data, and unseen data."""

        def source(split: str, **roles: bool) -> TensorSource:
            inputs, labels, *extras = data[split].tensors
            return TensorSource(inputs, labels, split=split, extras=tuple(extras), batch_size=500, **roles)

        data = self.data(seed).data
        return [source("train", passed=True), source("repair", passed=True, failed=True)], source("test")

    def trained(self, seed: int, path: Path) -> tuple[LightningModule, list[State]]:
        """The network of a seed, and its weights on the way there; from a file if it was trained before."""
        if not path.exists():
            torch.save(train(seed, self.network, self.data(seed), self.epochs)[1], path)
        states = torch.load(path, weights_only=True)
        model = self.network()
        model.load_state_dict(states[-1])
        return model, states[:-1]


def vehicles(experiment: str) -> Problem:
    """An experiment of the paper; a short training, as many networks are needed."""
    layers = ("classifier", "features.15.body.3", "features.14.body.3")
    return Problem(lambda seed: Vehicles(experiment, seed), VehicleNet, 12, TARGETS[experiment], layers)


PROBLEMS: Mapping[str, Problem] = {
    "weak-digit": Problem(WeakDigit, DigitCNN, EPOCHS, Target.label(WEAK), ("classifier", "features.10", "features.6")),
    "fashion": Problem(
        DriftingFashion,
        FashionNet,
        10,
        TARGETS["fashion"],
        ("classifier", "features.17", "features.11"),
    ),
    **{f"vehicles-{experiment}": vehicles(experiment) for experiment in "ABC"},
}


class CheckpointRuns:
    """Earlier weights of a training as a history for NeuRecover: each is run once, whatever layers are asked for."""

    def __init__(self, states: Sequence[State]) -> None:
        self.states = states
        self._passed: list[torch.Tensor] = []

    def points(self, known: Known) -> list[HistoryPoint]:
        """The points of the training, for the layers of `known`."""
        if not self._passed:
            for state in self.states:
                passed = known.evaluator.run_with(state, known.sources).passed
                self._passed.append(passed.to(torch.int8))
        weights = [torch.cat([state[name].flatten() for name in known.space.parameters]) for state in self.states]
        return [HistoryPoint(*point) for point in zip(self._passed, weights, strict=True)]
