"""Metrics of a model update for `torchmetrics`: rates from the literature, see `rates.RATES`.

The metrics compare the predictions of an old and a new model with the true classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.evaluation.rates import RATES, Rate
from lightning_nrl.evaluation.sample_results import flip_masks
from lightning_nrl.tasks import class_logits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torchmetrics.utilities.plot import _PLOT_OUT_TYPE

__all__ = [
    "BackwardErrorCompatibility",
    "BackwardTrustCompatibility",
    "BreakRate",
    "NegativeFlipImpact",
    "NegativeFlipRate",
    "PositiveFlipRate",
    "RelativeNegativeFlipRate",
    "RepairRate",
]


def _is_right(argument: str, preds: Tensor, target: Tensor) -> Tensor:
    if preds.is_floating_point():
        if preds.ndim == target.ndim + 1 and preds[:, 0].shape == target.shape:
            return (class_logits(preds).argmax(1) == target) & ~preds.isnan().any(1)
    elif preds.shape == target.shape:
        return preds == target
    raise ConfigurationError(
        f"`{argument}`: {preds.dtype} of shape {list(preds.shape)} does not fit a `target` "
        f"{list(target.shape)}.",
        "give classes as integers in the shape of the target, or logits [samples, classes, ...] as "
        "floats.",
    )


class FlipMetric(Metric):
    """Base class: counts kept, broken, repaired and failing samples, and computes a rate.

    The rate is NaN if undefined.

    All subclasses have the same state, so they form one compute group in a `MetricCollection`,
    which updates them once. Keyword arguments are those of :class:`torchmetrics.Metric`, such as
    `sync_on_compute`.
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
        """Counts the flips of one batch, whose true classes are `target`.

        Predictions are integer classes in the shape of `target`, or float logits, `samples x
        classes x ...`.
        """
        masks = flip_masks(
            _is_right("old_preds", old_preds, target), _is_right("new_preds", new_preds, target)
        )
        self.flips += torch.stack([mask.sum() for mask in masks])

    def compute(self) -> Tensor:
        return self.rate(self.flips)

    def plot(
        self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None
    ) -> _PLOT_OUT_TYPE:
        """Plots values of `compute` or `forward`, by default the current one."""
        return self._plot(val, ax)


class NegativeFlipRate(FlipMetric, rate="negative_flip_rate"):
    """Share of all samples that the update breaks: `broken / N` (Yan et al., CVPR 2021).

    Example:
        >>> from torch import tensor
        >>> metric = NegativeFlipRate()
        >>> old_preds, new_preds = tensor([0, 1, 1, 2]), tensor([0, 1, 2, 1])
        >>> metric(old_preds, new_preds, target=tensor([0, 1, 1, 1]))
        tensor(0.2500)
    """


class PositiveFlipRate(FlipMetric, rate="positive_flip_rate"):
    """Share of all samples that the update repairs: `repaired / N`."""


class NegativeFlipImpact(FlipMetric, rate="negative_flip_impact"):
    """Share of the new model's errors that are regressions: `broken / (broken + failing)`.

    Of two equally accurate models, the one with the lower impact surprises its users less. It is
    NaN without errors.
    """


class RelativeNegativeFlipRate(FlipMetric, rate="relative_negative_flip_rate"):
    """Negative flip rate (NFR) divided by the NFR that independent errors would give.

    It is `NFR / ((1 - ER_old) * ER_new)` (Yan et al., CVPR 2021), where ER are the error rates of
    the models. It allows comparing updates of different accuracy. It is NaN if the old model gets
    nothing right or the new model gets everything right.
    """

    plot_upper_bound = None


class BackwardTrustCompatibility(FlipMetric, rate="backward_trust_compatibility"):
    """Share of right samples that stay right: `kept / (kept + broken)`.

    See Srivastava et al., KDD 2020. It is 1 if the old model got nothing right, since nothing could
    break.
    """


class BackwardErrorCompatibility(FlipMetric, rate="backward_error_compatibility"):
    """Share of the new model's errors that the old model made too: `failing / (broken + failing)`.

    See Srivastava et al., KDD 2020.
    """


class RepairRate(FlipMetric, rate="repair_rate"):
    """Share of wrong samples that are now right: `repaired / (repaired + failing)`.

    See Sohn et al., Arachne. To get the rate over the targets (I_neg in the paper), update the
    metric with these samples only.
    """


class BreakRate(FlipMetric, rate="break_rate"):
    """Share of right samples that break: `broken / (kept + broken)` (Sohn et al., Arachne)."""
