"""How well a repair does on what it is for and on what it must keep: Arachne's two rates."""

from __future__ import annotations

from torch import Tensor

from lightning_nrl.metrics.base import FlipMetric
from lightning_nrl.metrics.functional import _break_rate, _repair_rate

__all__ = ["BreakRate", "RepairRate"]


class RepairRate(FlipMetric):
    r"""Compute the `repair rate`: the share of what was wrong that is now right.

    .. math::
        \text{RR} = \frac{\text{repaired}}{\text{repaired} + \text{failing}}

    After Sohn et al., Arachne. Give it the targeted samples alone for the rate within I_neg.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``old_preds`` (:class:`~torch.Tensor`): the old model's classes ``(N, ...)``, or its logits ``(N, C, ...)``.
    - ``new_preds`` (:class:`~torch.Tensor`): the new model's, likewise.
    - ``target`` (:class:`~torch.Tensor`): the true classes ``(N, ...)``.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``rr`` (:class:`~torch.Tensor`): a number in [0, 1]; NaN where the old model got nothing wrong.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, if the shapes do not fit together.

    Example:
        >>> from torch import tensor
        >>> metric = RepairRate()
        >>> metric(old_preds=tensor([0, 0, 2, 2]), new_preds=tensor([0, 1, 2, 1]), target=tensor([0, 1, 1, 1]))
        tensor(0.6667)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The rate over all that was counted since the last reset."""
        return _repair_rate(self.flips)


class BreakRate(FlipMetric):
    r"""Compute the `break rate`: the share of what was right that is now wrong.

    .. math::
        \text{BR} = \frac{\text{broken}}{\text{kept} + \text{broken}}

    After Sohn et al., Arachne. It is 1 - BTC, save where nothing was right before.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``old_preds`` (:class:`~torch.Tensor`): the old model's classes ``(N, ...)``, or its logits ``(N, C, ...)``.
    - ``new_preds`` (:class:`~torch.Tensor`): the new model's, likewise.
    - ``target`` (:class:`~torch.Tensor`): the true classes ``(N, ...)``.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``br`` (:class:`~torch.Tensor`): a number in [0, 1]; NaN where the old model got nothing right.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, if the shapes do not fit together.

    Example:
        >>> from torch import tensor
        >>> metric = BreakRate()
        >>> metric(old_preds=tensor([0, 1, 1, 2]), new_preds=tensor([0, 1, 2, 1]), target=tensor([0, 1, 1, 1]))
        tensor(0.3333)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The rate over all that was counted since the last reset."""
        return _break_rate(self.flips)
