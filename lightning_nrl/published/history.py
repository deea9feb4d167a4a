"""Earlier points of a training: the model's weights, and its results on the known data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_nrl._utils.checkpoint import read_fitting
from lightning_nrl._utils.state import State
from lightning_nrl.localization import KnownData

HISTORY_ARGUMENT = "NeuRecover.history"  # in messages


@dataclass(frozen=True)
class HistoryPoint:
    """Model at one point of its training."""

    passed: Tensor  # N int8, one per row of the results: 1 right, 0 wrong, -1 unknown
    weights: Tensor  # W: weights of the layers to repair, in the order of `ParameterSpace.flat`


@runtime_checkable
class History(Protocol):
    """Earlier points of a training, oldest first."""

    def points(self, known: KnownData) -> list[HistoryPoint]:
        """Returns the points, the same on every rank."""


@dataclass(frozen=True, eq=False)
class CheckpointHistory:
    """History of the checkpoints of one training, oldest first.

    Each checkpoint is evaluated once on the known data. A checkpoint is a module, a state dict, or
    the path of a Lightning checkpoint or of a saved state dict.
    """

    checkpoints: Sequence[nn.Module | State | str | Path]

    def points(self, known: KnownData) -> list[HistoryPoint]:
        """Evaluates each checkpoint; refuses one that cannot be read or does not fit."""
        points = []
        for checkpoint in self.checkpoints:
            state = read_fitting(HISTORY_ARGUMENT, checkpoint, known.evaluator.model)
            passed = known.evaluator.run_with(state, known.sources).passed.to(torch.int8)
            points.append(HistoryPoint(passed, known.space.flat(state)))
        return points
