"""How far an update can be trusted where its predecessor was: trust and error compatibility."""

from __future__ import annotations

from torch import Tensor

from lightning_nrl.metrics.base import FlipMetric
from lightning_nrl.metrics.functional import _backward_error_compatibility, _backward_trust_compatibility

__all__ = ["BackwardErrorCompatibility", "BackwardTrustCompatibility"]


class BackwardTrustCompatibility(FlipMetric):
    r"""Compute the `backward trust compatibility`: the share of what was right that stays right.

    .. math::
        \text{BTC} = \frac{\text{kept}}{\text{kept} + \text{broken}}

    After Srivastava et al., KDD 2020.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``old_preds`` (:class:`~torch.Tensor`): the old model's classes ``(N, ...)``, or its logits ``(N, C, ...)``.
    - ``new_preds`` (:class:`~torch.Tensor`): the new model's, likewise.
    - ``target`` (:class:`~torch.Tensor`): the true classes ``(N, ...)``.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``btc`` (:class:`~torch.Tensor`): a number in [0, 1]; 1 where the old model got nothing right, since
      then nothing could break.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, if the shapes do not fit together.

    Example:
        >>> from torch import tensor
        >>> metric = BackwardTrustCompatibility()
        >>> metric(old_preds=tensor([0, 1, 1, 2]), new_preds=tensor([0, 1, 2, 1]), target=tensor([0, 1, 1, 1]))
        tensor(0.6667)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The rate over all that was counted since the last reset."""
        return _backward_trust_compatibility(self.flips)


class BackwardErrorCompatibility(FlipMetric):
    r"""Compute the `backward error compatibility`: the share of the new model's errors that the old one made too.

    .. math::
        \text{BEC} = \frac{\text{failing}}{\text{broken} + \text{failing}}

    After Srivastava et al., KDD 2020.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``old_preds`` (:class:`~torch.Tensor`): the old model's classes ``(N, ...)``, or its logits ``(N, C, ...)``.
    - ``new_preds`` (:class:`~torch.Tensor`): the new model's, likewise.
    - ``target`` (:class:`~torch.Tensor`): the true classes ``(N, ...)``.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``bec`` (:class:`~torch.Tensor`): a number in [0, 1]; NaN where the new model makes no error.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ConfigurationError: in ``update``, if the shapes do not fit together.

    Example:
        >>> from torch import tensor
        >>> metric = BackwardErrorCompatibility()
        >>> metric(old_preds=tensor([0, 2, 2, 1]), new_preds=tensor([0, 2, 2, 2]), target=tensor([0, 1, 1, 1]))
        tensor(0.6667)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The rate over all that was counted since the last reset."""
        return _backward_error_compatibility(self.flips)
