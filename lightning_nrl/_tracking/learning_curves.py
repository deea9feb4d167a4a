"""What a training has taught and lost so far: samples learned, forgotten and never learned, in all and by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nrl.localization.training_record import RecordedSplit

MOST_CLASSES = 20
"""Classes up to which curves are logged for each."""


@dataclass(frozen=True)
class Learning:
    """The `n` samples of one split after some records."""

    label: Tensor  # n int64
    right: Tensor  # n bool, right at the last record
    was_right: Tensor  # n bool, right at some record

    @classmethod
    def of(cls, record: RecordedSplit) -> Learning:
        """After all records of a training that goes on."""
        return cls(record.label, record.passed[-1], record.passed.any(0))

    @property
    def masks(self) -> dict[str, Tensor]:
        """Each sample in one of three: right now; right before and wrong now; never right."""
        return {
            "learned": self.right,
            "forgotten": self.was_right & ~self.right,
            "never_learned": ~self.was_right,
        }

    def numbers(self, prefix: str, split: str) -> dict[str, float]:
        """Counts by tag: `<prefix>/<split>/learned` and so on; `<prefix>_<split>/forgotten/3` of class 3."""
        found = {}
        classes = self.label.unique().tolist()
        for name, mask in self.masks.items():
            found[f"{prefix}/{split}/{name}"] = float(mask.sum())
            if 1 < len(classes) <= MOST_CLASSES and classes[0] >= 0:
                counts = torch.bincount(self.label[mask], minlength=classes[-1] + 1).tolist()
                found |= {f"{prefix}_{split}/{name}/{one}": float(counts[one]) for one in classes}
        return found
