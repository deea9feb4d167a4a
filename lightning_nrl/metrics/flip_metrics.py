"""The rates of an update as `torchmetrics` metrics: four counts as one state, and a row of the table of rates each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_nrl.metrics.functional import _flips_update
from lightning_nrl.metrics.rates import RATES, Rate


class FlipMetric(Metric):
    """Counts kept, broken, repaired and failing samples, and computes one rate of them, NaN where it is undefined.

    All of them have the same state, so a `MetricCollection` updates it once for all (compute groups). Keyword arguments
    are those of :class:`torchmetrics.Metric`, such as `sync_on_compute`.
    """

    rate: ClassVar[Rate]
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound: float | None = 1.0

    flips: Tensor  # 4 int64: kept, broken, repaired, failing

    def __init_subclass__(cls, *, rate: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.rate = RATES[rate]
        cls.higher_is_better = cls.rate.higher_is_better

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

    def compute(self) -> Tensor:
        """The rate over all that was counted since the last reset."""
        return self.rate(self.flips)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """A figure and its axes (needs matplotlib) of what `compute` or `forward` gave, or a list of such.

        Args:
            val: these values; None calls `compute`.
            ax: the axes to draw on; None makes new ones.
        """
        return self._plot(val, ax)


class NegativeFlipRate(FlipMetric, rate="negative_flip_rate"):
    """The share of all samples that the update breaks: `broken / N` (Yan et al., CVPR 2021).

    Example:
        >>> from torch import tensor
        >>> metric = NegativeFlipRate()
        >>> metric(old_preds=tensor([0, 1, 1, 2]), new_preds=tensor([0, 1, 2, 1]), target=tensor([0, 1, 1, 1]))
        tensor(0.2500)
    """


class PositiveFlipRate(FlipMetric, rate="positive_flip_rate"):
    """The share of all samples that the update repairs: `repaired / N`, the gain that stands against the NFR."""


class NegativeFlipImpact(FlipMetric, rate="negative_flip_impact"):
    """The share of the new model's errors that are regressions: `broken / (broken + failing)`.

    Of two models of equal accuracy it names the one whose errors are news to its users. NaN where the new model makes
    no error.
    """


class RelativeNegativeFlipRate(FlipMetric, rate="relative_negative_flip_rate"):
    """NFR against that of two models that err independently: `NFR / ((1 - ER_old) * ER_new)` (Yan et al., CVPR 2021).

    ER are the error rates of the two models. A number from 0; 1 is what independent errors give. It compares updates of
    different accuracy. NaN where the old model gets nothing right or the new one everything.
    """

    plot_upper_bound = None


class BackwardTrustCompatibility(FlipMetric, rate="backward_trust_compatibility"):
    """The share of what was right that stays right: `kept / (kept + broken)` (Srivastava et al., KDD 2020).

    1 where the old model got nothing right, since then nothing could break.
    """


class BackwardErrorCompatibility(FlipMetric, rate="backward_error_compatibility"):
    """The share of the new model's errors that are old ones: `failing / (broken + failing)` (Srivastava, KDD 2020).

    NaN where the new model makes no error.
    """


class RepairRate(FlipMetric, rate="repair_rate"):
    """The share of what was wrong that is now right: `repaired / (repaired + failing)` (Sohn et al., Arachne).

    Give it the targeted samples alone for the rate within I_neg. NaN where the old model got nothing wrong.
    """


class BreakRate(FlipMetric, rate="break_rate"):
    """The share of what was right that is now wrong: `broken / (kept + broken)` (Sohn et al., Arachne).

    It is 1 - BTC, save that it is NaN where the old model got nothing right.
    """
