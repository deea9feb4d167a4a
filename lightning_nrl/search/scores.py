"""Scores of candidates: the counts and losses that a scorer returns and a fitness reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_nrl._utils.device import widest


@dataclass(frozen=True)
class Scores:
    """Scores of P candidates in each of S independent searches, over the data of all ranks.

    I_neg are the failed samples to repair, and I_pos are the passed samples that a search must not
    break.
    """

    patched: Tensor  # S x P float, number of samples of I_neg that pass under the candidate
    intact: Tensor  # S x P float, number of samples of I_pos that still pass
    loss_failed: Tensor  # S x P, mean loss over I_neg
    loss_passed: Tensor  # S x P, mean loss over I_pos
    n_failed: int | Tensor  # |I_neg|, a number or S x 1
    n_passed: int | Tensor  # |I_pos|, a number or S x 1
    value: Tensor | None = (
        None  # S x P, total sample weight of the patched samples, at most |I_neg|; None: no weights
    )
    cost: Tensor | None = (
        None  # S x P whole numbers, total sample weight of broken samples of I_pos; None: no weights
    )
    least: float = 1.0  # smallest weight of a sample of I_neg, from 0 to 1
    credit_failed: Tensor | None = (
        None  # S x P, sum over I_neg of 1 if right, else 1 / (loss + 1); None: not computed
    )
    credit_passed: Tensor | None = None  # S x P, the same sum over I_pos

    def columns(self) -> tuple[Tensor, ...]:
        """Returns four tensors `S x P` in float64, or float32 on MPS. The last two are
        `loss_failed`
        and `loss_passed`.

        The first two are the numbers (or the total sample weights) of repaired samples and of kept
        samples.
        """
        repaired = self.patched if self.value is None else self.value
        kept = self.intact if self.cost is None else self.n_passed - self.cost
        dtype = widest(self.patched.device)
        return (
            repaired.to(dtype),
            kept.to(dtype),
            self.loss_failed.to(dtype),
            self.loss_passed.to(dtype),
        )

    def finite(self, value: Tensor) -> Tensor:
        """Returns a copy of `value`, `S x P`, with minus infinity where `value` or a loss is NaN or
        infinite.
        """
        finite = self.loss_failed.isfinite() & self.loss_passed.isfinite() & value.isfinite()
        return value.masked_fill(~finite, -math.inf)


class Scorer(Protocol):
    """Scores candidates on I_neg and I_pos.

    A scorer with the attribute `gives_up = True` may stop early. It takes a second argument
    `most_broken`, `S x P`: the total sample weight of I_pos that each candidate may break. A
    candidate that breaks more, or whose `most_broken` is negative, may get NaN losses and
    meaningless counts.
    """

    def __call__(self, values: Tensor) -> Scores:
        """Scores candidates `S x P x K`: searches x candidates x values of the localised weights."""
