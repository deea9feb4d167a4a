"""What became of every sample: kept, broken, repaired or failing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.errors import EvaluationError
from lightning_nrl.evaluation.flip_counts import FlipCounts, TargetCounts
from lightning_nrl.evaluation.sample_results import SampleResults

__all__ = ["FlipCounts", "Flips"]


@dataclass(frozen=True)
class Flips:
    """What became of each of `N` samples; every sample is in exactly one of the four masks.

    Attributes:
        kept: `N` bool, right before and after.
        broken: `N` bool, right before, wrong after.
        repaired: `N` bool, wrong before, right after.
        failing: `N` bool, wrong before and after.
    """

    kept: Tensor
    broken: Tensor
    repaired: Tensor
    failing: Tensor

    @classmethod
    def between(cls, before: SampleResults, after: SampleResults) -> Flips:
        """Compares two tables of the same rows. A sample whose loss is NaN or infinite counts as wrong.

        Raises:
            EvaluationError: the tables are not about the same samples in the same order.
        """
        if before.splits != after.splits or before.sizes != after.sizes or not torch.equal(before.index, after.index):
            raise EvaluationError(
                f"results before ({_shape(before)}) and after ({_shape(after)}) is not about the same samples.",
                "collect both from the same data, without shuffling.",
            )
        old, new = (results.passed & results.loss.isfinite() for results in (before, after))
        return cls(kept=old & new, broken=old & ~new, repaired=~old & new, failing=~old & ~new)

    def counts(self, rows: Tensor | slice = slice(None)) -> FlipCounts:
        """How many of the chosen rows (a mask or a slice; all by default) went which way."""
        return FlipCounts(*(int(mask[rows].sum()) for mask in (self.kept, self.broken, self.repaired, self.failing)))

    def target_counts(self, targeted: Tensor, rows: Tensor | slice = slice(None)) -> TargetCounts:
        """The same, with what became of the failed samples that were to be repaired, `N` bool."""
        masks = (self.kept, self.broken, self.repaired, self.failing, targeted, self.repaired & targeted)
        return TargetCounts(*(int(mask[rows].sum()) for mask in masks))


def _shape(results: SampleResults) -> str:
    return ", ".join(f"{split}: {size:,}" for split, size in zip(results.splits, results.sizes, strict=True))
