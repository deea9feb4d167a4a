"""What a patch does on the way from the original weights to the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_nrl.evaluation.flips import FlipCounts
from lightning_nrl.report.document import Row, Table

__all__ = ["StrengthPoint", "strength_table"]


@dataclass(frozen=True)
class StrengthPoint:
    """What a patch does at one strength.

    Attributes:
        strength: t, 0 for the original weights and 1 for the patch.
        repaired_in_target: targeted samples that pass.
        known: what becomes of all known samples.
        calibration: what becomes of the calibration data; None if there are none.
        polished: whether the weights were polished there, and the counts are those after it.
        gain: what the repaired targets are worth; None: as many as they are.
        harm: what the broken known samples cost; likewise.
        harm_aside: what the broken calibration samples cost; likewise.
    """

    strength: float
    repaired_in_target: int
    known: FlipCounts
    calibration: FlipCounts | None = None
    polished: bool = False
    gain: float | None = None
    harm: float | None = None
    harm_aside: float | None = None

    @property
    def worth(self) -> float:
        """What the repaired targets are worth."""
        return self.repaired_in_target if self.gain is None else self.gain

    @property
    def cost(self) -> float:
        """What the broken known samples cost."""
        return self.known.broken if self.harm is None else self.harm

    @property
    def cost_aside(self) -> float:
        """What the broken calibration samples cost; 0 without any."""
        if self.harm_aside is not None:
            return self.harm_aside
        return 0 if self.calibration is None else self.calibration.broken


def strength_table(path: Sequence[StrengthPoint], chosen: float | None) -> Table:
    """What a patch does at several strengths, the chosen one marked."""
    columns = [("repaired", "of the target"), ("repaired", "known"), ("broken", "known")]
    calibrated = any(point.calibration is not None for point in path)
    columns += [("repaired", "calibration"), ("broken", "calibration")] if calibrated else []
    rows = []
    for point in path:
        cells = [point.repaired_in_target, point.known.repaired, point.known.broken]
        if point.calibration is not None:
            cells += [point.calibration.repaired, point.calibration.broken]
        taken = point.strength == chosen
        label = f"strength {point.strength:g}" + ", polished" * point.polished + ", taken" * taken
        rows.append(Row(label, tuple(f"{n:,}" for n in cells), "gain" if taken else ""))
    return Table(tuple(columns), tuple(rows))
