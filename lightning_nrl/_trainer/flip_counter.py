"""Counting a validation against the replaced model: what is kept, broken, repaired and failing."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nrl._trainer.reference_validation import ReferenceResults
from lightning_nrl._utils.distributed import Collective
from lightning_nrl.errors import ConfigurationError
from lightning_nrl.metrics.rates import UPDATE_RATES


class FlipCounter:
    """What one validation has found so far, on the device; nothing waits for it before the end."""

    def __init__(self, reference: ReferenceResults, device: torch.device) -> None:
        self.reference = reference
        n = len(reference.passed)
        self.new = torch.zeros(n, dtype=torch.bool, device=device)
        self.counted = torch.zeros(n, dtype=torch.bool, device=device)
        self.label = reference.label.to(device)
        self.label_mismatches = torch.zeros((), dtype=torch.int64, device=device)

    def size(self, batch_idx: int) -> int:
        """How many samples a batch should have; 0 where there should be no such batch."""
        starts = self.reference.starts
        return starts[batch_idx + 1] - starts[batch_idx] if batch_idx + 1 < len(starts) else 0

    def add(self, batch_idx: int, right: Tensor, label: Tensor | None) -> None:
        """One batch: `m` bool, whether the new model is right, and `m` int64, the true classes."""
        expected = self.size(batch_idx)
        if right.shape != (expected,):
            raise ConfigurationError(
                f"`val` data: a batch of {expected} samples came with an output for {list(right.shape)}.",
                "validate the same samples each time; a collate function must neither drop nor add any.",
            )
        rows = slice(*self.reference.starts[batch_idx : batch_idx + 2])
        self.new[rows] = right.to(self.new.device)
        self.counted[rows] = True
        if label is not None:
            self.label_mismatches += (label.to(self.label.device) != self.label[rows]).sum()

    def counts(self, collective: Collective) -> tuple[tuple[str, ...], Tensor]:
        """The names of the slices, and `1 + S x 4`, kept, broken, repaired and failing, of all and of each slice."""
        known, new = self.reference, self.new.cpu()
        old, counted = known.passed, known.once & self.counted.cpu()
        masks = torch.stack([old & new, old & ~new, ~old & new, ~old & ~new], 1) & counted[:, None]
        flips = torch.zeros(len(known.names) + 1, 4, dtype=torch.int64)
        # Samples in no slice go into the first row, which is then that of all.
        flips.index_add_(0, known.group + 1, masks.long())
        flips[0] = masks.sum(0)
        total = collective.sum(torch.cat([flips.flatten(), self.label_mismatches.cpu()[None]]))
        if total[-1]:
            raise ConfigurationError(
                f"`val` data: {int(total[-1])} samples have another label than when training began.",
                "validate the same samples in the same order each time.",
            )
        return known.names, total[:-1].view(-1, 4)


def metrics_of(flips: Tensor) -> list[dict[str, float]]:
    """All metrics of each row of `S x 4` counts; what is undefined is NaN."""
    wide = flips.double()
    n = wide.sum(1)
    columns = {
        **{rate.short: rate(wide) for rate in UPDATE_RATES},
        "broken": wide[:, 1],
        "repaired": wide[:, 2],
        "accuracy": (wide[:, 0] + wide[:, 2]) / n,
        "reference_accuracy": (wide[:, 0] + wide[:, 1]) / n,
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]
