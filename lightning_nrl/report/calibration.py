"""What calibration data say of the accepted model, in limits that hold although they may have chosen its strength."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CalibrationBounds"]


@dataclass(frozen=True)
class CalibrationBounds:
    """How many calibration samples broke, and at most how many others like them do.

    Attributes:
        broken: how many broke.
        n: how many were right before.
        confidence: with which the limit holds, in (0, 1).
        upper: the limit on the rate at which others like them break, in (0, 1].
        states: how many sets of weights the calibration data might have chosen; 1 if they had no say.
        allowed: the count up to which weights were accepted, one strength after the other, from weak to strong, if that
            is how these were; else None. The limit is then that of this count.
    """

    broken: int
    n: int
    confidence: float
    upper: float
    states: int = 1
    allowed: int | None = None
