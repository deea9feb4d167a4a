"""`AtMostBroken`, a release rule that counts broken samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_nrl.evaluation.sample_results import FlipCounts
from lightning_nrl.gate.gates import Gate, allowance
from lightning_nrl.updates.rules import Part, SplitRule, accuracies


@dataclass(frozen=True)
class AtMostBroken(SplitRule):
    """Allows in each split at most as many broken samples as a gate allows.

    Attributes:
        gate: a `Gate`, or its text. `instance` allows no broken sample; `accuracy` allows as many
            as are repaired, so that the accuracy does not fall; `tolerance:3` allows 3;
            `tolerance:1%` allows 1 % of the passed samples.
        splits: names of the splits; empty: all splits.

    Example:
        >>> print(AtMostBroken("accuracy", splits=("test",)))
        accuracy in test
    """

    gate: Gate | str = "instance"
    splits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gate", Gate.parse(self.gate))
        self.is_worse(FlipCounts(0, 0, 0, 0), 1)  # raises an error for a gate that needs a target

    def is_worse(self, counts: FlipCounts, n_parts: int) -> bool:
        return Gate.parse(self.gate).excess_of(counts) > 0

    def sentences(self, parts: Sequence[Part]) -> list[str]:
        sentences = []
        for part in parts:
            counts = part.counts
            broken = f"{counts.broken:,} of {counts.passed:,} that were right broke"
            limit = allowance(Gate.parse(self.gate), counts)
            sentences.append(f"{part.name}: {broken}; {limit} ({accuracies(counts)})")
        return sentences

    @property
    def text(self) -> str:
        return str(self.gate)
