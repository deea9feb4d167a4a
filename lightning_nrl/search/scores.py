"""Scores of candidates: the counts and losses that a scorer returns and a fitness reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

from lightning_nrl._utils.device import widest


class Columns(NamedTuple):
    """What a fitness compares, `P` each."""

    repaired: Tensor  # number, or total sample weight, of repaired samples
    kept: Tensor  # number, or total sample weight, of kept samples
    loss_failed: Tensor  # mean loss over I_neg
    loss_passed: Tensor  # mean loss over I_pos


@dataclass(frozen=True)
class Scores:
    """Scores of P candidates, over the data of all ranks.

    I_neg are the failed samples to repair, and I_pos are the passed samples that a search must not
    break.
    """

    patched: Tensor  # P float, number of samples of I_neg that pass under the candidate
    intact: Tensor  # P float, number of samples of I_pos that still pass
    loss_failed: Tensor  # P, mean loss over I_neg
    loss_passed: Tensor  # P, mean loss over I_pos
    n_failed: int  # |I_neg|
    n_passed: int  # |I_pos|
    # P, total sample weight of the patched samples, at most |I_neg|; None: no weights
    value: Tensor | None = None
    # P whole numbers, total sample weight of broken samples of I_pos; None: no weights
    cost: Tensor | None = None
    least: float = 1.0  # smallest weight of a sample of I_neg, from 0 to 1
    credit_failed: Tensor | None = None  # P, sum over I_neg of `FitnessFunction.credit`
    credit_passed: Tensor | None = None  # P, the same sum over I_pos

    def columns(self) -> Columns:
        """Returns what a fitness compares, in float64, or float32 on MPS."""
        dtype = widest(self.patched.device)
        repaired = self.patched if self.value is None else self.value
        kept = self.intact if self.cost is None else self.n_passed - self.cost
        return Columns(
            repaired.to(dtype),
            kept.to(dtype),
            self.loss_failed.to(dtype),
            self.loss_passed.to(dtype),
        )

    def finite(self, value: Tensor) -> Tensor:
        """Returns `value`, `P`, with minus infinity where it or a loss is NaN or infinite."""
        finite = self.loss_failed.isfinite() & self.loss_passed.isfinite() & value.isfinite()
        return value.masked_fill(~finite, -math.inf)

    def of_original(self) -> Scores:
        """Returns counts and losses of candidate 0, in tensors of length 1."""
        return Scores(
            self.patched[:1],
            self.intact[:1],
            self.loss_failed[:1],
            self.loss_passed[:1],
            self.n_failed,
            self.n_passed,
        )


Scorer: TypeAlias = Callable[..., Scores]
"""Scores candidates `P x K`, values of the localised weights, on I_neg and I_pos.

A second argument `P`, if any, is the total sample weight of I_pos that each candidate may break.
Scoring may stop early for a candidate that breaks more: it may get NaN losses and meaningless
counts.
"""
