"""The protocol of all ways of localising, and their names."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_nrl._utils.registry import Registry
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.localization.impact import Replay
from lightning_nrl.localization.localization import Localization

__all__ = ["LOCALIZERS", "Localizer"]


@runtime_checkable
class Localizer(Protocol):
    """Chooses the weights to be searched. One of your own is a frozen dataclass with this call."""

    @property
    def include_bias(self) -> bool:
        """Whether biases may be chosen too: the weight space is made accordingly."""
        ...

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Localises.

        Args:
            recording: the model on the known data of this rank.
            evaluator: what gives each sample's loss, and the ranks that share the data.
            failed: `N` bool, the samples to be repaired (I_neg), by row of the evidence.
            passed: `N` bool, the samples to be kept (I_pos).

        Raises:
            EmptyLocalizationError: no weight can be chosen.
        """
        ...


LOCALIZERS: Registry[Localizer] = Registry("Localizer", "NeuRecoverLite()", lambda value: isinstance(value, Localizer))
"""The ways of localising that can be named."""
