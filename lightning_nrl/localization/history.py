"""Earlier points of a training: the model's weights at each point, and its results on the known data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_nrl._utils.checkpoint import fitting, read_state
from lightning_nrl._utils.state import State
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.evaluation.layers import ParameterSpace
from lightning_nrl.evaluation.sample_results import SampleResults
from lightning_nrl.localization.localizer import Localizer


@dataclass(frozen=True)
class KnownData:
    """The known data, and the model's results on them, for a `DataLocalizer`."""

    evaluator: Evaluator
    sources: Sequence[Any]  # this rank's share of the known data, `Source` objects
    before: SampleResults  # results of the model before the repair
    space: ParameterSpace  # the layers whose weights are localised


@dataclass(frozen=True)
class HistoryPoint:
    """Model at one point of its training."""

    passed: Tensor  # N int8, one per row of the results: 1 right, 0 wrong, -1 unknown
    weights: Tensor  # W: weights of the layers to repair, in the order of `ParameterSpace.flat`


class History(Protocol):
    """Earlier points of a training, oldest first."""

    def points(self, known: KnownData) -> list[HistoryPoint]:
        """Returns the points, the same on every rank."""


@runtime_checkable
class DataLocalizer(Protocol):
    """Creates a localizer that needs more than a recording of the current model: the known data or earlier models.

    If its optional attribute `wants_history` is True, `with_history(folder)` is called with the folder of the
    `TrainingHistory` in the same Trainer, and must return the `DataLocalizer` whose `on` is then called.
    """

    @property
    def include_bias(self) -> bool:
        """True if biases may be chosen too."""

    def on(self, known: KnownData) -> Localizer:
        """Returns the localizer for the known data."""


def on_data(localizer: Localizer, known: KnownData) -> Localizer:
    """Returns `localizer.on(known)` if `localizer` is a `DataLocalizer`, and otherwise `localizer` itself."""
    return localizer.on(known) if isinstance(localizer, DataLocalizer) else localizer


@dataclass(frozen=True, eq=False)
class CheckpointHistory:
    """History of the checkpoints of one training, oldest first. Each checkpoint is evaluated once on the known data.

    A checkpoint is a module, a state dict, or the path of a Lightning checkpoint or of a saved state dict.
    """

    checkpoints: Sequence[nn.Module | State | str | Path]

    def points(self, known: KnownData) -> list[HistoryPoint]:
        """Evaluates each checkpoint. A checkpoint that cannot be read or does not fit raises a `ConfigurationError`."""
        points, argument = [], "NeuRecover.history"
        for checkpoint in self.checkpoints:
            state = fitting(argument, read_state(argument, checkpoint), known.evaluator.model)
            passed = known.evaluator.run_with(state, known.sources).passed.to(torch.int8)
            weights = torch.cat([state[name].flatten() for name in known.space.parameters])
            points.append(HistoryPoint(passed, weights))
        return points
