"""What calibration data say of the accepted model, in limits that hold although they may have chosen its strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_nrl.report.document import Row, Table
from lightning_nrl.stats.binomial import percent_up, show_confidence

__all__ = ["CalibrationBounds", "SliceLimit", "calibration_words", "slices_table"]


@dataclass(frozen=True)
class SliceLimit:
    """One slice of the calibration data.

    Attributes:
        name: of the slice.
        broken: how many of its samples broke.
        n: how many were right before.
        upper: the limit on the rate at which others like them break, in (0, 1]; all slices' limits hold together.
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


def calibration_words(bounds: CalibrationBounds) -> tuple[tuple[str, str], ...]:
    """The limits as facts."""
    sure = show_confidence(bounds.confidence)
    share = f" ({100 * bounds.broken / bounds.n:.2f} %)" if bounds.n else ""
    limit = f"with {sure} confidence at most {percent_up(bounds.upper)} of such samples"
    facts = [("calibration", f"broken {bounds.broken:,} of {bounds.n:,}{share}; {limit}{_how(bounds)}")]
    if bounds.weighted is not None:
        mix = ", ".join(f"{name} {100 * share:g} %" for name, share in (bounds.mix or {}).items())
        limit = f"with {sure} confidence at most {percent_up(bounds.weighted)} of samples in the mix {mix}"
        facts.append(("calibration, weighted", limit))
    if bounds.warning:
        facts.append(("warning", f"beside the repair data, {bounds.warning}"))
    return tuple(facts)


def slices_table(bounds: CalibrationBounds) -> Table:
    """The limit of each slice."""
    columns = (("right before", ""), ("broken", ""), ("at most", f"{show_confidence(bounds.confidence)}, all together"))
    rows = (Row(part.name, (f"{part.n:,}", f"{part.broken:,}", percent_up(part.upper))) for part in bounds.slices)
    return Table(columns, tuple(rows))


def _how(bounds: CalibrationBounds) -> str:
    if bounds.allowed is not None:
        return f" (the limit of {bounds.allowed:,} broken, up to which each strength was accepted, the weakest first)"
    if bounds.states > 1:
        return f" (it holds for each of {bounds.states:,} sets of weights that these data might have chosen)"
    return ""
