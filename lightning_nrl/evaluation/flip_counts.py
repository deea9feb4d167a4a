"""How many samples an update keeps, breaks, repairs and leaves failing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["FlipCounts", "TargetCounts"]


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
        masks = (before & after, before & ~after, ~before & after, ~before & ~after)
        return FlipCounts(*(int(mask.sum()) for mask in masks))


@dataclass(frozen=True)
class TargetCounts(FlipCounts):
    """Counts of samples, some of whose failures were to be repaired.

    Attributes:
        targeted: failed samples that were to be repaired (I_neg).
        repaired_in_target: those of them that are right after.
    """

    targeted: int = 0
    repaired_in_target: int = 0
