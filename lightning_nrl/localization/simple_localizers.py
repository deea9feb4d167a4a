"""Localisations that every other has to be better than: all weights, by the gradient alone, at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.errors import check_whole
from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.localization.impact import measure
from lightning_nrl.localization.localizer import LOCALIZERS, Localization, Replay, check_numbers, localized
from lightning_nrl.localization.neurecover_lite import default_n_weights


@LOCALIZERS.register("all")
@dataclass(frozen=True)
class AllWeights:
    """Takes every weight of the layer, whatever the data; biases too if `include_bias` says so."""

    include_bias: bool = False

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Takes all weights."""
        total = recording.space.size
        weights = torch.arange(total, device=recording.space.device)
        sizes = {"failed": total, "passed": 0, "both": 0, "localized": total, "total": total}
        return Localization(weights, total, None, sizes)


@LOCALIZERS.register("gradient")
@dataclass(frozen=True)
class ByGradient:
    """Localises the weights with the largest mean loss gradient on the failed samples, whatever the passed ones say.

    Attributes:
        n_weights: how many; None: as many as `default_n_weights` says.
        include_bias: whether biases may be localised too.
    """

    n_weights: int | None = None
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights)

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Takes the largest gradients, of equal ones the first; weights without any are left out."""
        gradient = measure(recording, evaluator, failed).backward
        wanted = self.n_weights or default_n_weights(len(gradient))
        top = gradient.argsort(descending=True, stable=True)[:wanted]
        weights = top[gradient[top] > 0].sort().values
        return localized(weights, len(weights), wanted, len(gradient))


@LOCALIZERS.register("random")
@dataclass(frozen=True)
class RandomWeights:
    """Draws weights without looking at the data, each with the same probability.

    Attributes:
        n_weights: how many; None: as many as `default_n_weights` says. All, if the layer has no more.
        seed: of the draw, from 0 to 2^32 - 1. That of the repair does not matter: several repairs search the same
            weights.
        include_bias: whether biases may be drawn too.
    """

    n_weights: int | None = None
    seed: int = 0
    include_bias: bool = False

    def __post_init__(self) -> None:
        check_numbers(n_weights=self.n_weights)
        check_whole("seed", self.seed, 0, 2**32 - 1)

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """Draws on the CPU, so that every device and every rank has the same weights."""
        total = recording.space.size
        wanted = self.n_weights or default_n_weights(total)
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[:wanted]
        return localized(drawn.sort().values.to(recording.space.device), len(drawn), wanted, total)
