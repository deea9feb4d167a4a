"""What became of every sample, and how many there are of each: kept, broken, repaired or failing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.errors import EvaluationError
from lightning_nrl.evaluation.sample_results import SampleResults

__all__ = ["FlipCounts", "Flips", "TargetCounts", "flip_masks"]


def flip_masks(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns masks of the kept, broken, repaired and failing samples, from which are right before and after."""
    return before & after, before & ~after, ~before & after, ~before & ~after


@dataclass(frozen=True)
class FlipCounts:
    """How many samples went which way.

    Attributes:
        kept: right before and after.
        broken: right before, wrong after: the regressions.
        repaired: wrong before, right after.
        failing: wrong before and after.
    """

    kept: int
    broken: int
    repaired: int
    failing: int

    @property
    def n(self) -> int:
        """All samples."""
        return self.kept + self.broken + self.repaired + self.failing

    @property
    def passed(self) -> int:
        """Right before."""
        return self.kept + self.broken

    @property
    def right(self) -> int:
        """Right after."""
        return self.kept + self.repaired

    @property
    def accuracy_before(self) -> float:
        """Share of samples right before, in [0, 1]; NaN without samples."""
        return self.passed / self.n if self.n else float("nan")

    @property
    def accuracy_after(self) -> float:
        """Share of samples right after, in [0, 1]; NaN without samples."""
        return self.right / self.n if self.n else float("nan")

    @staticmethod
    def of(before: Tensor, after: Tensor) -> FlipCounts:
        """Counts samples, `N` bool each: which were right before, and which are after."""
        return FlipCounts(*(int(mask.sum()) for mask in flip_masks(before, after)))


@dataclass(frozen=True)
class TargetCounts(FlipCounts):
    """Counts of samples, some of whose failures were to be repaired.

    Attributes:
        targeted: failed samples that were to be repaired (I_neg).
        repaired_in_target: those of them that are right after.
        passed_in_target: right samples of the kind that was to be repaired (`Target.covers`).
        broken_in_target: those of them that are wrong after: 0 is the paper's instance level (section III).
    """

    targeted: int = 0
    repaired_in_target: int = 0
    passed_in_target: int = 0
    broken_in_target: int = 0


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
        return cls(*flip_masks(before.right, after.right))

    def counts(self, rows: Tensor | slice = slice(None)) -> FlipCounts:
        """How many of the chosen rows (a mask or a slice; all by default) went which way."""
        return FlipCounts(*(int(mask[rows].sum()) for mask in (self.kept, self.broken, self.repaired, self.failing)))

    def target_counts(self, before: SampleResults, rows: Tensor | slice = slice(None)) -> TargetCounts:
        """The same, with what became of the samples in the target by the results before."""
        targeted, broken = before.targeted, self.broken & before.in_target
        own = (targeted, self.repaired & targeted, (self.kept & before.in_target) | broken, broken)
        masks = (self.kept, self.broken, self.repaired, self.failing, *own)
        return TargetCounts(*(int(mask[rows].sum()) for mask in masks))


def _shape(results: SampleResults) -> str:
    return ", ".join(f"{split}: {size:,}" for split, size in zip(results.splits, results.sizes, strict=True))
