"""What is known of candidate weights: counts and losses, the arrow from scoring to fitness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["QuittingScorer", "Scorer", "Scores"]


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
        gain: what the patched samples are worth, `S x P`, at most |I_neg|; None: as many as they are.
        harm: what the samples of I_pos that fail cost, `S x P` of whole numbers; None: as many as they are.
        least: what the least of I_neg is worth, from 0 to 1.
    """

    patched: Tensor
    intact: Tensor
    loss_failed: Tensor
    loss_passed: Tensor
    n_failed: int | Tensor
    n_passed: int | Tensor
    gain: Tensor | None = None
    harm: Tensor | None = None
    least: float = 1.0


class Scorer(Protocol):
    """Scores candidate weights against I_neg and I_pos."""

    def __call__(self, values: Tensor) -> Scores:
        """Scores candidates.

        Args:
            values: `S x P x K`, values of the K localised weights.
        """
        ...


@runtime_checkable
class QuittingScorer(Protocol):
    """A scorer that need not finish a candidate that breaks too many samples."""

    @property
    def gives_up(self) -> bool:
        """Whether it does; if not, `most_broken` has no effect."""
        ...

    def __call__(self, values: Tensor, most_broken: Tensor | None = None) -> Scores:
        """Scores candidates.

        Args:
            values: `S x P x K`, values of the K localised weights.
            most_broken: `S x P`, how many samples of I_pos each may break, or what they may cost where weights are
                given; None for any number. One that breaks more may come back with NaN losses and counts that mean
                nothing; below 0, whatever it breaks.
        """
        ...
