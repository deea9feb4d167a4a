"""What calibration data say of the accepted model, in limits that hold although they may have chosen its strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CalibrationBounds", "SliceLimit"]


@dataclass(frozen=True)
class SliceLimit:
    """One slice of the calibration data: of `n` samples right before, so many broke.

    At most a share `upper`, in (0, 1], of others like them does; all slices' limits hold together.
    """

    name: str
    broken: int
    n: int
    upper: float


@dataclass(frozen=True)
class CalibrationBounds:
    """How many calibration samples broke, and at most how many others like them do.

    Attributes:
        broken: how many broke.
        n: how many were right before.
        confidence: with which each kind of limit holds, in (0, 1).
        upper: the limit on the rate at which others like them break, in (0, 1].
        states: how many sets of weights the calibration data might have chosen; 1 if they had no say.
        allowed: the count up to which weights were accepted, one strength after the other, from weak to strong, if that
            is how these were; else None. The limit is then that of this count.
        slices: a limit for each slice; empty if none are told apart.
        mix: the expected share of each slice among samples that were right before; empty if none was given.
        weighted: the limit under that mix; None without one.
        warning: where the slices come up more often in the repair data; empty if the mixes do not differ.
    """

    broken: int
    n: int
    confidence: float
    upper: float
    states: int = 1
    allowed: int | None = None
    slices: tuple[SliceLimit, ...] = ()
    mix: Mapping[str, float] | None = None
    weighted: float | None = None
    warning: str = ""
