"""Scores of candidate weights, counts and losses: what a scorer gives and a fitness takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_nrl._utils.device import widest


@dataclass(frozen=True)
class Scores:
    """Sums over all ranks, `S x P`: of S independent searches with P candidates each, on the device."""

    patched: Tensor  # S x P float, samples of I_neg that now pass
    intact: Tensor  # S x P float, samples of I_pos that still pass
    loss_failed: Tensor  # S x P, mean loss over I_neg
    loss_passed: Tensor  # S x P, mean loss over I_pos
    n_failed: int | Tensor  # |I_neg|, a number or S x 1
    n_passed: int | Tensor  # |I_pos|, a number or S x 1
    gain: Tensor | None = None  # S x P, what the patched samples are worth, at most |I_neg|; None: as many as they are
    harm: Tensor | None = None  # S x P of whole numbers, what failing samples of I_pos cost; None: as many as they are
    least: float = 1.0  # what the least of I_neg is worth, from 0 to 1
    credit_failed: Tensor | None = None  # S x P, sum over I_neg of 1 if right, else 1 / (loss + 1); None: not asked for
    credit_passed: Tensor | None = None  # S x P, the same over I_pos

    def columns(self) -> tuple[Tensor, ...]:
        """Returns repaired and kept samples, by weight, and both losses, `S x P` each in the widest dtype."""
        gain = self.patched if self.gain is None else self.gain
        kept = self.intact if self.harm is None else self.n_passed - self.harm
        dtype = widest(self.patched.device)
        return gain.to(dtype), kept.to(dtype), self.loss_failed.to(dtype), self.loss_passed.to(dtype)

    def finite(self, value: Tensor) -> Tensor:
        """Returns the value of each candidate, minus infinity where a loss, or the value, is NaN or infinite."""
        finite = self.loss_failed.isfinite() & self.loss_passed.isfinite() & value.isfinite()
        return value.masked_fill(~finite, -math.inf)


class Scorer(Protocol):
    """Scores candidate weights against I_neg and I_pos.

    One with `gives_up = True` need not finish a candidate that breaks too many samples: it also takes `most_broken`,
    `S x P`, how many samples of I_pos each may break, or what they may cost where weights are given. Counts of a
    candidate that breaks more may mean nothing if its losses are NaN; below 0, whatever it breaks.
    """

    def __call__(self, values: Tensor) -> Scores:
        """Scores candidates, `S x P x K`: values of the K localised weights."""
