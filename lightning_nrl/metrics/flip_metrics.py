"""The rates of an update as `torchmetrics` metrics: four counts as one state, and a row of the table of rates each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_nrl.metrics.functional import _flips_update
from lightning_nrl.metrics.rates import RATES, Rate

__all__ = [
    "BackwardErrorCompatibility",
    "BackwardTrustCompatibility",
    "BreakRate",
    "FlipMetric",
    "NegativeFlipImpact",
    "NegativeFlipRate",
    "PositiveFlipRate",
    "RelativeNegativeFlipRate",
    "RepairRate",
]


class FlipMetric(Metric):
    """Counts kept, broken, repaired and failing samples, and computes one rate of them.

    All of them have the same state, so a `MetricCollection` updates it once for all (compute groups).

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``old_preds`` (:class:`~torch.Tensor`): the old model's classes ``(N, ...)``, or its logits ``(N, C, ...)``.
    - ``new_preds`` (:class:`~torch.Tensor`): the new model's, likewise.
    - ``target`` (:class:`~torch.Tensor`): the true classes ``(N, ...)``.

    As output of ``forward`` and ``compute`` the metric returns the rate as a :class:`~torch.Tensor`; where it is
    undefined, NaN.

    Args:
        kwargs: of :class:`torchmetrics.Metric`, such as `sync_on_compute`.

    Raises:
        ConfigurationError: in ``update``, if the shapes do not fit together.
    """

    rate: ClassVar[Rate]
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

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
        """Plots one value or several (needs matplotlib).

        Args:
            val: what `compute` or `forward` gave, or a list of such; None calls `compute`.
            ax: the axes to draw on; None makes new ones.

        Returns:
            A figure and its axes.
        """
        return self._plot(val, ax)


class NegativeFlipRate(FlipMetric, rate="negative_flip_rate"):
    r"""Compute the `negative flip rate`: the share of all samples that the update breaks (Yan et al., CVPR 2021).

    .. math::
        \text{NFR} = \frac{\text{broken}}{N}

    Input, output and errors are those of :class:`FlipMetric`.

    Example:
        >>> from torch import tensor
        >>> metric = NegativeFlipRate()
        >>> metric(old_preds=tensor([0, 1, 1, 2]), new_preds=tensor([0, 1, 2, 1]), target=tensor([0, 1, 1, 1]))
        tensor(0.2500)
    """


class PositiveFlipRate(FlipMetric, rate="positive_flip_rate"):
    r"""Compute the `positive flip rate`: the share of all samples that the update repairs.

    .. math::
        \text{PFR} = \frac{\text{repaired}}{N}

    The gain that stands against the negative flip rate. Input, output and errors are those of :class:`FlipMetric`.
    """


class NegativeFlipImpact(FlipMetric, rate="negative_flip_impact"):
    r"""Compute the `negative flip impact`: the share of the new model's errors that are regressions.

    .. math::
        \text{NFI} = \frac{\text{broken}}{\text{broken} + \text{failing}}

    Of two models of equal accuracy it names the one whose errors are news to its users. Input, output and errors are
    those of :class:`FlipMetric`; NaN where the new model makes no error.
    """


class RelativeNegativeFlipRate(FlipMetric, rate="relative_negative_flip_rate"):
    r"""Compute the `relative negative flip rate`: NFR against that of two models that err independently.

    .. math::
        \text{NFR}_\text{rel} = \frac{\text{NFR}}{(1 - \text{ER}_\text{old}) \cdot \text{ER}_\text{new}}

    Where :math:`\text{ER}` are the error rates of the two models (Yan et al., CVPR 2021). It is a number from 0; 1 is
    what independent errors give. It compares updates of different accuracy. Input, output and errors are those of
    :class:`FlipMetric`; NaN where the old model gets nothing right or the new one everything.
    """


class BackwardTrustCompatibility(FlipMetric, rate="backward_trust_compatibility"):
    r"""Compute the `backward trust compatibility`: the share of what was right that stays right.

    .. math::
        \text{BTC} = \frac{\text{kept}}{\text{kept} + \text{broken}}

    After Srivastava et al., KDD 2020. Input, output and errors are those of :class:`FlipMetric`; 1 where the old model
    got nothing right, since then nothing could break.
    """


class BackwardErrorCompatibility(FlipMetric, rate="backward_error_compatibility"):
    r"""Compute the `backward error compatibility`: the share of the new model's errors that the old one made too.

    .. math::
        \text{BEC} = \frac{\text{failing}}{\text{broken} + \text{failing}}

    After Srivastava et al., KDD 2020. Input, output and errors are those of :class:`FlipMetric`; NaN where the new
    model makes no error.
    """


class RepairRate(FlipMetric, rate="repair_rate"):
    r"""Compute the `repair rate`: the share of what was wrong that is now right.

    .. math::
        \text{RR} = \frac{\text{repaired}}{\text{repaired} + \text{failing}}

    After Sohn et al., Arachne. Give it the targeted samples alone for the rate within I_neg. Input, output and errors
    are those of :class:`FlipMetric`; NaN where the old model got nothing wrong.
    """


class BreakRate(FlipMetric, rate="break_rate"):
    r"""Compute the `break rate`: the share of what was right that is now wrong.

    .. math::
        \text{BR} = \frac{\text{broken}}{\text{kept} + \text{broken}}

    After Sohn et al., Arachne. It is 1 - BTC, save where nothing was right before. Input, output and errors are those
    of :class:`FlipMetric`; NaN where the old model got nothing right.
    """
