"""The protocol of all ways of localising, and their names."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_nrl._utils.distributed import Collective
from lightning_nrl._utils.registry import Registry
from lightning_nrl.localization.impact import Replay
from lightning_nrl.localization.localization import Localization
from lightning_nrl.tasks import Task

__all__ = ["LOCALIZERS", "Localizer"]


@runtime_checkable
class Localizer(Protocol):
    """Chooses the weights to be searched. One of your own is a frozen dataclass with this call."""

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

        Raises:
            EmptyLocalizationError: no weight can be chosen.
        """
        ...


LOCALIZERS: Registry[Localizer] = Registry("Localizer", "NeuRecoverLite()", lambda value: isinstance(value, Localizer))
"""The ways of localising that can be named."""
