"""Scores of candidate weights: counts and losses, returned by a scorer and read by a fitness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_nrl._utils.device import widest


@dataclass(frozen=True)
class Scores:
    """Scores of P candidates in each of S independent searches, summed over all ranks, on the device."""

    patched: Tensor  # S x P float, samples of I_neg that now pass
    intact: Tensor  # S x P float, samples of I_pos that still pass
    loss_failed: Tensor  # S x P, mean loss over I_neg
    loss_passed: Tensor  # S x P, mean loss over I_pos
    n_failed: int | Tensor  # |I_neg|, a number or S x 1
    n_passed: int | Tensor  # |I_pos|, a number or S x 1
    value: Tensor | None = None  # S x P, total weight of the patched samples, at most |I_neg|; None: their number
    cost: Tensor | None = None  # S x P whole numbers, total weight of broken samples of I_pos; None: their number
    least: float = 1.0  # smallest weight of a sample of I_neg, from 0 to 1
    credit_failed: Tensor | None = None  # S x P, sum over I_neg of 1 if right, else 1 / (loss + 1); None: not computed
    credit_passed: Tensor | None = None  # S x P, the same sum over I_pos

    def columns(self) -> tuple[Tensor, ...]:
        """Returns weighted counts of repaired and kept samples and both losses, `S x P` each, in the widest dtype."""
        repaired = self.patched if self.value is None else self.value
        kept = self.intact if self.cost is None else self.n_passed - self.cost
        dtype = widest(self.patched.device)
        return repaired.to(dtype), kept.to(dtype), self.loss_failed.to(dtype), self.loss_passed.to(dtype)

    def finite(self, value: Tensor) -> Tensor:
        """Replaces values by minus infinity where a loss or the value itself is NaN or infinite."""
        finite = self.loss_failed.isfinite() & self.loss_passed.isfinite() & value.isfinite()
        return value.masked_fill(~finite, -math.inf)


class Scorer(Protocol):
    """Scores candidate weights on I_neg and I_pos.

    A scorer with `gives_up = True` may stop early: it also takes `most_broken`, `S x P`, the number (or total weight)
    of samples of I_pos that each candidate may break. A candidate above its limit may get NaN losses and meaningless
    counts; with a negative limit any candidate may.
    """

    def __call__(self, values: Tensor) -> Scores:
        """Scores candidates, `S x P x K`, values of the K localised weights."""
