"""The one call that every way of localising answers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_nrl._utils.distributed import Collective
from lightning_nrl.localization.impact import Replay
from lightning_nrl.localization.localization import Localization
from lightning_nrl.tasks import Task

__all__ = ["Localizer"]


class Localizer(Protocol):
    """Chooses the weights to be searched."""

    @property
    def include_bias(self) -> bool:
        """Whether biases may be chosen too: the weight space is made accordingly."""
        ...

    def __call__(
        self, recording: Replay, task: Task, *, failed: Tensor, passed: Tensor, collective: Collective | None = None
    ) -> Localization:
        """Localises.

        Args:
            recording: the model on the known data of this rank.
            task: gives each sample's loss.
            failed: `N` bool, the samples to be repaired (I_neg), by row of the evidence.
            passed: `N` bool, the samples to be kept (I_pos).
            collective: the ranks that share the data.
        """
        ...
