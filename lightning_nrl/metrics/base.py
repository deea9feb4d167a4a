"""The shell that all metrics of model updates share: four counts as one state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_nrl.metrics.functional import _flips_update

__all__ = ["FlipMetric"]


class FlipMetric(Metric):
    """Counts kept, broken, repaired and failing samples; a metric of its own adds `compute`.

    All of them have the same state, so a `MetricCollection` updates it once for all (compute groups).

    Args:
        kwargs: of :class:`torchmetrics.Metric`, such as `sync_on_compute`.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    flips: Tensor  # 4 int64: kept, broken, repaired, failing

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("flips", default=torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, old_preds: Tensor, new_preds: Tensor, target: Tensor) -> None:
        """Counts one batch.

        Args:
            old_preds: the old model's classes `N x ...` (integers), or its logits `N x C x ...` (floats).
            new_preds: the new model's, likewise; it may know another number of classes.
            target: the true classes, `N x ...` integers.

        Raises:
            ConfigurationError: the shapes do not fit together.
        """
        self.flips += _flips_update(old_preds, new_preds, target)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plots one value or several (needs matplotlib).

        Args:
            val: what `compute` or `forward` gave, or a list of such; None calls `compute`.
            ax: the axes to draw on; None makes new ones.

        Returns:
            A figure and its axes.
        """
        return self._plot(val, ax)
