"""The rates of a model update: formulas of counts of kept, broken, repaired and failing samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_nrl.evaluation.sample_results import FlipCounts


@dataclass(frozen=True)
class Rate:
    """One rate of a model update.

    Attributes:
        name: name in reports.
        short: short name, the tag in logs.
        meaning: the formula in words.
        compute: the formula, a function of four tensors of counts: kept, broken, repaired, failing.
            0/0 is NaN.
    """

    name: str
    short: str
    meaning: str
    compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    higher_is_better: bool = False

    def __call__(self, flips: Tensor) -> Tensor:
        """Computes the rate from counts, `... x 4`: kept, broken, repaired, failing."""
        return self.compute(*flips.unbind(-1))

    def of(self, counts: FlipCounts) -> float:
        four = counts.kept, counts.broken, counts.repaired, counts.failing
        return float(self(torch.tensor(four, dtype=torch.float64)))

    @property
    def title(self) -> str:
        """Short name as a heading, such as `relative NFR`."""
        prefix, _, acronym = self.short.rpartition("_")
        return f"{prefix} {acronym.upper()}".strip()

    @property
    def label(self) -> str:
        """Name and meaning, such as `negative flip rate: broken of all`."""
        return f"{self.name.replace('_', ' ')}: {self.meaning}"


# k, b, r and f are kept, broken, repaired and failing.
_ALL = (
    Rate(
        "negative_flip_rate",
        "nfr",
        "broken of all",
        lambda k, b, r, f: b / (k + b + r + f),
    ),
    Rate(
        "positive_flip_rate",
        "pfr",
        "repaired of all",
        lambda k, b, r, f: r / (k + b + r + f),
        higher_is_better=True,
    ),
    Rate(
        "negative_flip_impact",
        "nfi",
        "broken of those wrong now",
        lambda k, b, r, f: b / (b + f),
    ),
    Rate(
        "relative_negative_flip_rate",
        "relative_nfr",
        "1 if old and new errors were independent",
        lambda k, b, r, f: b / (b + f) / ((k + b) / (k + b + r + f)),
    ),
    Rate(
        "backward_trust_compatibility",
        "btc",
        "kept of those right before",
        # Nothing can break if nothing was right.
        lambda k, b, r, f: torch.where(k + b == 0, 1.0, k / (k + b)),
        higher_is_better=True,
    ),
    Rate(
        "backward_error_compatibility",
        "bec",
        "failing of those wrong now",
        lambda k, b, r, f: f / (b + f),
        higher_is_better=True,
    ),
    Rate(
        "repair_rate",
        "rr",
        "repaired of those wrong before",
        lambda k, b, r, f: r / (r + f),
        higher_is_better=True,
    ),
    Rate(
        "break_rate",
        "br",
        "broken of those right before",
        lambda k, b, r, f: b / (k + b),
    ),
)
RATES: Mapping[str, Rate] = MappingProxyType({rate.name: rate for rate in _ALL})
"""All rates by name."""

UPDATE_RATES: tuple[Rate, ...] = tuple(
    rate for rate in _ALL if rate.short in ("nfr", "pfr", "relative_nfr", "btc", "bec")
)
"""The rates with which reports compare a new model with the model that it replaces."""


def rates_of(counts: FlipCounts) -> dict[str, float]:
    """Computes all rates in double precision, by name. An undefined rate is NaN."""
    return {name: rate.of(counts) for name, rate in RATES.items()}
