"""No localisation: every weight of the layer is searched. What localisation has to be better than."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.evaluation.evaluator import Evaluator
from lightning_nrl.localization.impact import Replay
from lightning_nrl.localization.localizer import LOCALIZERS, Localization

__all__ = ["AllWeights"]


@LOCALIZERS.register("all")
@dataclass(frozen=True)
class AllWeights:
    """Takes every weight of the layer, whatever the data; biases too if `include_bias` says so."""

    include_bias: bool = False

    def __call__(self, recording: Replay, evaluator: Evaluator, *, failed: Tensor, passed: Tensor) -> Localization:
        """All weights, as the set operation would give them if they mattered for the failed data alone."""
        total = recording.space.size
        weights = torch.arange(total, device=recording.space.device)
        sizes = {"failed": total, "passed": 0, "both": 0, "localized": total, "total": total}
        return Localization(weights, total, None, sizes)
