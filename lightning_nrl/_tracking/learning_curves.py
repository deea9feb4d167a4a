"""What a training has taught and lost so far: samples learned, forgotten and never learned, in all and by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.localization.training_record import RecordedSplit, SplitPoint

__all__ = ["MOST_CLASSES", "Learning"]

MOST_CLASSES = 20
"""Classes up to which curves are logged for each."""


@dataclass(frozen=True)
class Learning:
    """The samples of one split after some records, `n` bool each, and `n` int64.

    A sample that a record does not know counts as it was known last; one that no record knew counts nowhere.
    """

    label: Tensor
    seen: Tensor  # known at some record
    right: Tensor  # right when it was last known
    was_right: Tensor  # right at some record

    @classmethod
    def none(cls, n: int) -> Learning:
        """Before the first record."""
        return cls(torch.full((n,), -1), *(torch.zeros(n, dtype=torch.bool) for _ in range(3)))

    @classmethod
    def of(cls, record: RecordedSplit) -> Learning:
        """After all records of a training that goes on."""
        right = record.passed & record.known
        return cls(record.label, record.known.any(0), record.right[-1], right.any(0))

    def after(self, point: SplitPoint) -> Learning:
        """After one record more."""
        right = point.passed & point.known
        return Learning(
            torch.where(point.known, point.label, self.label),
            self.seen | point.known,
            torch.where(point.known, point.passed, self.right),
            self.was_right | right,
        )

    @property
    def masks(self) -> dict[str, Tensor]:
        """Each seen sample in one of three: right now; right before and wrong now; never right."""
        return {
            "learned": self.right,
            "forgotten": self.was_right & ~self.right,
            "never_learned": self.seen & ~self.was_right,
        }

    def numbers(self, prefix: str, split: str) -> dict[str, float]:
        """Counts by tag: `<prefix>/<split>/learned` and so on; `<prefix>_<split>/forgotten/3` of class 3."""
        found = {}
        classes = self.label[self.seen].unique().tolist()
        for name, mask in self.masks.items():
            found[f"{prefix}/{split}/{name}"] = float(mask.sum())
            if 1 < len(classes) <= MOST_CLASSES and classes[0] >= 0:
                counts = torch.bincount(self.label[mask & self.seen], minlength=classes[-1] + 1).tolist()
                found |= {f"{prefix}_{split}/{name}/{one}": float(counts[one]) for one in classes}
        return found
