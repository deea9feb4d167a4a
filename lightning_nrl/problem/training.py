"""How a method goes on with the training of the model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_nrl._utils.state import State
from lightning_nrl._utils.timing import StageTimer

__all__ = ["Training"]


class Training(Protocol):
    """Goes on with the training of the model, the known failures added to the training data."""

    def __call__(
        self, *, seconds: float, seed: int, clock: StageTimer, start: State | None = None, weight: Tensor | None = None
    ) -> State | None:
        """Trains a copy; the model stays as it is.

        Args:
            seconds: how long that may take; infinite: as many epochs as the model was trained for.
            seed: of the order of the samples and of all else that is random.
            clock: is notified of progress.
            start: weights to begin with, such as fresh ones; None: the model's own.
            weight: `N` by row of the results, how often a sample is trained on in an epoch, on average; None: once.

        Returns:
            Every parameter and persistent buffer after training, on the model's device; None if the time is too short
            for a training worth its name.
        """
        ...
