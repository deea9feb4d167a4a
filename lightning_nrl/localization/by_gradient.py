"""Localisation by the loss gradient alone: what forward impacts and passed data have to add something to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.localization.impact import Replay, measure
from lightning_nrl.localization.localizer import LOCALIZERS, Localization, check_numbers, localized
from lightning_nrl.localization.neurecover_lite import default_n_weights

__all__ = ["ByGradient"]


@LOCALIZERS.register("gradient")
@dataclass(frozen=True)
class ByGradient:
    """Localises the weights with the largest mean loss gradient on the failed samples, whatever the passed ones say.

    Attributes:
        n_weights: how many; None: as many as `default_n_weights` says.
        include_bias: whether biases may be localised too.

    Raises:
        ConfigurationError: a number below 1 or not whole.
    """

    n_weights: int | None = None
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights)

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """The largest gradients, of equal ones the first; weights without any are left out."""
        gradient = measure(recording, evaluator, failed).backward
        wanted = self.n_weights or default_n_weights(len(gradient))
        top = gradient.argsort(descending=True, stable=True)[:wanted]
        weights = top[gradient[top] > 0].sort().values
        return localized(weights, len(weights), wanted, len(gradient))
