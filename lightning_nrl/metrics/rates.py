"""The one table of rates of an update: name, formula and source of each, and the function that computes it.

Every rate follows from four counts, kept, broken, repaired and failing, that add up over batches and machines. Reports,
the release gate, TensorBoard, the counting of validations and the switch read this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_nrl.evaluation.flip_counts import FlipCounts

__all__ = ["RATES", "UPDATE_RATES", "Rate", "flip_rates", "rates_of"]


@dataclass(frozen=True)
class Rate:
    """One rate of an update.

    Attributes:
        name: in words, joined by `_`: the name of its function and in reports.
        short: in lower case, its tag in logs.
        formula: in the counts.
        meaning: the formula in words.
        source: author and year; empty where none is needed.
        higher_is_better: whether a better update has a higher one.
        compute: of kept, broken, repaired and failing, each a tensor `...`, to the rate, `...`; 0/0 is NaN.
    """

    name: str
    short: str
    formula: str
    meaning: str
    source: str
    higher_is_better: bool
    compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def __call__(self, flips: Tensor) -> Tensor:
        """The rate of counts `... x 4`, kept, broken, repaired and failing."""
        return self.compute(*flips.unbind(-1))

    def of(self, counts: FlipCounts) -> float:
        """The rate of one set of counts, in double precision."""
        return float(self(_tensor(counts)))

    @property
    def title(self) -> str:
        """Its short name as a heading, such as `relative NFR`."""
        first, _, rest = self.short.rpartition("_")
        return f"{first} {rest.upper()}".strip()

    @property
    def label(self) -> str:
        """Its name and what it means, such as `negative flip rate: broken of all`."""
        return f"{self.name.replace('_', ' ')}: {self.meaning}"


def _relative_nfr(kept: Tensor, broken: Tensor, repaired: Tensor, failing: Tensor) -> Tensor:
    return broken / (broken + failing) / ((kept + broken) / (kept + broken + repaired + failing))


def _btc(kept: Tensor, broken: Tensor, repaired: Tensor, failing: Tensor) -> Tensor:
    # Where nothing was right before, nothing could break.
    return torch.where(kept + broken == 0, 1.0, kept / (kept + broken))


_ALL = (
    Rate(
        "negative_flip_rate",
        "nfr",
        "broken / N",
        "broken of all",
        "Yan et al. 2021",
        False,
        lambda kept, broken, repaired, failing: broken / (kept + broken + repaired + failing),
    ),
    Rate(
        "positive_flip_rate",
        "pfr",
        "repaired / N",
        "repaired of all",
        "",
        True,
        lambda kept, broken, repaired, failing: repaired / (kept + broken + repaired + failing),
    ),
    Rate(
        "negative_flip_impact",
        "nfi",
        "broken / (broken + failing)",
        "broken of those wrong now",
        "",
        False,
        lambda kept, broken, repaired, failing: broken / (broken + failing),
    ),
    Rate(
        "relative_negative_flip_rate",
        "relative_nfr",
        "NFR / ((1 - error rate before) * error rate after)",
        "1 if old and new errors were independent",
        "Yan et al. 2021",
        False,
        _relative_nfr,
    ),
    Rate(
        "backward_trust_compatibility",
        "btc",
        "kept / (kept + broken)",
        "kept of those right before",
        "Srivastava et al. 2020",
        True,
        _btc,
    ),
    Rate(
        "backward_error_compatibility",
        "bec",
        "failing / (broken + failing)",
        "failing of those wrong now",
        "Srivastava et al. 2020",
        True,
        lambda kept, broken, repaired, failing: failing / (broken + failing),
    ),
    Rate(
        "repair_rate",
        "rr",
        "repaired / (repaired + failing)",
        "repaired of those wrong before",
        "Sohn et al. 2023",
        True,
        lambda kept, broken, repaired, failing: repaired / (repaired + failing),
    ),
    Rate(
        "break_rate",
        "br",
        "broken / (kept + broken)",
        "broken of those right before",
        "Sohn et al. 2023",
        False,
        lambda kept, broken, repaired, failing: broken / (kept + broken),
    ),
)
RATES: Mapping[str, Rate] = MappingProxyType({rate.name: rate for rate in _ALL})
"""All rates by name."""

UPDATE_RATES: tuple[Rate, ...] = tuple(
    rate for rate in _ALL if rate.short in ("nfr", "pfr", "relative_nfr", "btc", "bec")
)
"""The rates of one model against the one that it replaces, for which no failures are targeted."""


def flip_rates(flips: Tensor) -> dict[str, Tensor]:
    """All rates by name.

    Args:
        flips: `... x 4`, kept, broken, repaired, failing; floats keep their precision, integers give float32.

    Returns:
        One tensor `...` a rate. Undefined ones are NaN.
    """
    return {name: rate(flips) for name, rate in RATES.items()}


def rates_of(counts: FlipCounts) -> dict[str, float]:
    """All rates of one set of counts by name, in double precision. Undefined ones are NaN."""
    return {name: float(rate) for name, rate in flip_rates(_tensor(counts)).items()}


def _tensor(counts: FlipCounts) -> Tensor:
    return torch.tensor([counts.kept, counts.broken, counts.repaired, counts.failing], dtype=torch.float64)
