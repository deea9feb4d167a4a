"""How often an update breaks and repairs: shares of all samples and of errors."""

from __future__ import annotations

from torch import Tensor

from lightning_nrl.metrics.base import FlipMetric
from lightning_nrl.metrics.functional import (
    _negative_flip_impact,
    _negative_flip_rate,
    _positive_flip_rate,
    _relative_negative_flip_rate,
)

__all__ = ["NegativeFlipImpact", "NegativeFlipRate", "PositiveFlipRate", "RelativeNegativeFlipRate"]


class NegativeFlipRate(FlipMetric):
    r"""Compute the `negative flip rate`: the share of all samples that the update breaks.

    .. math::
        \text{NFR} = \frac{\text{broken}}{N}

    After Yan et al., CVPR 2021.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``old_preds`` (:class:`~torch.Tensor`): the old model's classes ``(N, ...)``, or its logits ``(N, C, ...)``.
    - ``new_preds`` (:class:`~torch.Tensor`): the new model's, likewise.
    - ``target`` (:class:`~torch.Tensor`): the true classes ``(N, ...)``.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``nfr`` (:class:`~torch.Tensor`): a number in [0, 1]; NaN without samples.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, if the shapes do not fit together.

    Example:
        >>> from torch import tensor
        >>> metric = NegativeFlipRate()
        >>> metric(old_preds=tensor([0, 1, 1, 2]), new_preds=tensor([0, 1, 2, 1]), target=tensor([0, 1, 1, 1]))
        tensor(0.2500)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The rate over all that was counted since the last reset."""
        return _negative_flip_rate(self.flips)


class PositiveFlipRate(FlipMetric):
    r"""Compute the `positive flip rate`: the share of all samples that the update repairs.

    .. math::
        \text{PFR} = \frac{\text{repaired}}{N}

    The gain that stands against the negative flip rate.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``old_preds`` (:class:`~torch.Tensor`): the old model's classes ``(N, ...)``, or its logits ``(N, C, ...)``.
    - ``new_preds`` (:class:`~torch.Tensor`): the new model's, likewise.
    - ``target`` (:class:`~torch.Tensor`): the true classes ``(N, ...)``.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``pfr`` (:class:`~torch.Tensor`): a number in [0, 1]; NaN without samples.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, if the shapes do not fit together.

    Example:
        >>> from torch import tensor
        >>> metric = PositiveFlipRate()
        >>> metric(old_preds=tensor([0, 0, 2, 2]), new_preds=tensor([0, 1, 2, 1]), target=tensor([0, 1, 1, 1]))
        tensor(0.5000)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The rate over all that was counted since the last reset."""
        return _positive_flip_rate(self.flips)


class NegativeFlipImpact(FlipMetric):
    r"""Compute the `negative flip impact`: the share of the new model's errors that are regressions.

    .. math::
        \text{NFI} = \frac{\text{broken}}{\text{broken} + \text{failing}}

    Of two models of equal accuracy it names the one whose errors are news to its users.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``old_preds`` (:class:`~torch.Tensor`): the old model's classes ``(N, ...)``, or its logits ``(N, C, ...)``.
    - ``new_preds`` (:class:`~torch.Tensor`): the new model's, likewise.
    - ``target`` (:class:`~torch.Tensor`): the true classes ``(N, ...)``.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``nfi`` (:class:`~torch.Tensor`): a number in [0, 1]; NaN where the new model makes no error.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, if the shapes do not fit together.

    Example:
        >>> from torch import tensor
        >>> metric = NegativeFlipImpact()
        >>> metric(old_preds=tensor([0, 1, 2, 2]), new_preds=tensor([0, 2, 2, 1]), target=tensor([0, 1, 1, 1]))
        tensor(0.5000)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The rate over all that was counted since the last reset."""
        return _negative_flip_impact(self.flips)


class RelativeNegativeFlipRate(FlipMetric):
    r"""Compute the `relative negative flip rate`: NFR against that of two models that err independently.

    .. math::
        \text{NFR}_\text{rel} = \frac{\text{NFR}}{(1 - \text{ER}_\text{old}) \cdot \text{ER}_\text{new}}

    Where :math:`\text{ER}` are the error rates of the two models; after Yan et al., CVPR 2021. It compares updates of
    different accuracy.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``old_preds`` (:class:`~torch.Tensor`): the old model's classes ``(N, ...)``, or its logits ``(N, C, ...)``.
    - ``new_preds`` (:class:`~torch.Tensor`): the new model's, likewise.
    - ``target`` (:class:`~torch.Tensor`): the true classes ``(N, ...)``.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``relative_nfr`` (:class:`~torch.Tensor`): a number from 0; 1 is what independent errors give. NaN where the old
      model gets nothing right or the new one everything.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, if the shapes do not fit together.

    Example:
        >>> from torch import tensor
        >>> metric = RelativeNegativeFlipRate()
        >>> metric(old_preds=tensor([0, 1, 2, 2]), new_preds=tensor([0, 2, 2, 1]), target=tensor([0, 1, 1, 1]))
        tensor(1.)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The rate over all that was counted since the last reset."""
        return _relative_negative_flip_rate(self.flips)
