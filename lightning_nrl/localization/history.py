"""Earlier points of a training: their weights, and which known samples were right."""

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
class Known:
    """The data that a localiser of `DataLocalizer` may look at, and what the model does on them."""

    evaluator: Evaluator
    sources: Sequence[Any]  # this rank's share of the known data, a `Source` each
    before: SampleResults  # what the model does on all of them
    space: ParameterSpace  # the layers whose weights are localised


@dataclass(frozen=True)
class HistoryPoint:
    """The model at one point of its training."""

    passed: Tensor  # N int8 by row of the results: 1 right, 0 wrong, -1 not known
    weights: Tensor  # W, of the layers to be repaired, in the order of the weight space


class History(Protocol):
    """Earlier points of a training, the oldest first."""

    def points(self, known: Known) -> list[HistoryPoint]:
        """Returns the data of each point, the same on every rank."""


@runtime_checkable
class DataLocalizer(Protocol):
    """A localiser that looks at more than a recording of the model as it is now.

    With `wants_history`, it is given the folder of a `TrainingHistory` in the same Trainer by `with_history(folder)`.
    """

    @property
    def include_bias(self) -> bool:
        """As that of a `Localizer`."""

    def on(self, known: Known) -> Localizer:
        """Returns the localiser for these data."""


def on_data(localizer: Localizer, known: Known) -> Localizer:
    """Returns the localiser to be called: of a `DataLocalizer` that for the data, any other one as it is."""
    return localizer.on(known) if isinstance(localizer, DataLocalizer) else localizer


@dataclass(frozen=True, eq=False)
class CheckpointHistory:
    """Checkpoints of one training, the oldest first; each is run once over the known data.

    Attributes:
        checkpoints: paths of Lightning checkpoints or of saved state dicts, modules, or state dicts.
    """

    checkpoints: Sequence[nn.Module | State | str | Path]

    def points(self, known: Known) -> list[HistoryPoint]:
        """Runs the model with the weights of each; a `ConfigurationError` if one cannot be read or does not fit."""
        return [self._point(checkpoint, known) for checkpoint in self.checkpoints]

    def _point(self, checkpoint: Any, known: Known) -> HistoryPoint:
        argument = "NeuRecover.history"
        state = fitting(argument, read_state(argument, checkpoint), known.evaluator.model)
        passed = known.evaluator.run_with(state, known.sources).passed
        return HistoryPoint(
            passed.to(torch.int8), torch.cat([state[name].flatten() for name in known.space.parameters])
        )
