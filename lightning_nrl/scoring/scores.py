"""What is known of candidate weights: counts and losses, the arrow from scoring to fitness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Scorer", "Scores"]


@dataclass(frozen=True)
class Scores:
    """Sums over all ranks, one entry a candidate (`S x P`: S independent swarms of P particles). On the device.

    Attributes:
        patched: samples of I_neg that now pass, `S x P` float.
        intact: samples of I_pos that still pass, `S x P` float.
        loss_failed: mean loss over I_neg, `S x P`.
        loss_passed: mean loss over I_pos, `S x P`.
        n_failed: |I_neg|, a number or `S x 1`.
        n_passed: |I_pos|, a number or `S x 1`.
    """

    patched: Tensor
    intact: Tensor
    loss_failed: Tensor
    loss_passed: Tensor
    n_failed: int | Tensor
    n_passed: int | Tensor


class Scorer(Protocol):
    """Scores candidate weights against I_neg and I_pos."""

    def __call__(self, values: Tensor) -> Scores:
        """Scores candidates.

        Args:
            values: `S x P x K`, values of the K localised weights.
        """
        ...
