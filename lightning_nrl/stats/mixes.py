"""Whether two data sets have the same mix of slices: a bound over all slices holds only where they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.stats.slice_bounds import Column, Name, read_column

__all__ = ["MixCheck", "check_mix"]

Counts = NDArray[Any]

SIGNIFICANCE_LEVEL = 0.01
"""Mixes differ if mixes as different as these come from one and the same population with a smaller probability."""

MIN_EXPECTED_COUNT = 5
"""Expected counts in a cell of the table from which on the chi-squared distribution fits (Cochran 1954)."""

RANDOM_TABLES = 1999
"""Random tables where it does not fit."""


@dataclass(frozen=True)
class MixCheck:
    """Two mixes side by side.

    Attributes:
        calibration: the share of each slice in the calibration data, by its name.
        other: the same in the other data; it has the same names in the same order.
        statistic: Pearson's chi-squared statistic of homogeneity.
        p_value: the probability of a statistic as large if both are drawn from one population.
    """

    calibration: Mapping[Name, float]
    other: Mapping[Name, float]
    statistic: float
    p_value: float

    @property
    def differs(self) -> bool:
        """Whether the mixes differ significantly (p < 0.01)."""
        return self.p_value < SIGNIFICANCE_LEVEL

    @property
    def warning(self) -> str:
        """What to bear in mind; empty if the mixes do not differ.

        It names the slices that account for most of the difference: those that come up more often in the other data,
        the largest difference first, until half of what they have more is named.
        """
        if not self.differs:
            return ""
        more = {name: self.other[name] - share for name, share in self.calibration.items()}
        more = {name: gain for name, gain in sorted(more.items(), key=lambda item: -item[1]) if gain > 0}
        named: list[Name] = []
        while sum(more[name] for name in named) < sum(more.values()) / 2:
            named.append(list(more)[len(named)])
        here, there = (sum(mix[name] for name in named) for mix in (self.calibration, self.other))
        shown = ", ".join(repr(name) for name in named[:3]) + (f" and {len(named) - 3} more" if named[3:] else "")
        words = f"slice {shown} is" if len(named) == 1 else f"slices {shown} are"
        return (
            f"the overall bound holds only for data like the calibration data; {words} {_percent(here)} of the "
            f"calibration data and {_percent(there)} of the other; use the bounds per slice or weight them"
        )


def check_mix(calibration: Column, other: Column) -> MixCheck:
    """Compares the shares of slices, or of classes, in two data sets by a chi-squared test of homogeneity.

    The p-value is that of the chi-squared distribution. Where an expected count is below 5, which it fits badly, it is
    the share of 1,999 random tables with the same margins whose statistic is as large, counting the found one (a
    permutation test; the draws are always the same and leave the global random state alone).

    Args:
        calibration: `N` names or whole numbers, one a sample.
        other: `M` of the same kind, for instance of the repair data.

    Raises:
        ConfigurationError: a column is empty, or they are not of one kind.

    Example:
        >>> check_mix([0] * 890 + [1] * 110, [0] * 31 + [1] * 69).differs
        True
    """
    columns = read_column("calibration", calibration), read_column("other", other)
    for argument, column in zip(("calibration", "other"), columns, strict=True):
        if len(column) == 0:
            raise ConfigurationError(f"`{argument}` is empty.", "give at least one sample.")
    if (columns[0].dtype.kind == "U") != (columns[1].dtype.kind == "U"):
        raise ConfigurationError(
            f"`calibration` is a column of {columns[0].dtype} and `other` of {columns[1].dtype}.",
            "give names in both or numbers in both.",
        )
    names, which = np.unique(np.concatenate(columns), return_inverse=True)
    split = len(columns[0])
    counts = np.stack([np.bincount(part, minlength=len(names)) for part in (which[:split], which[split:])])
    expected = np.outer(counts.sum(1), counts.sum(0) / counts.sum())
    statistic = float(_chi_squared(counts[1], expected))
    here, there = (dict(zip(names.tolist(), (row / row.sum()).tolist(), strict=True)) for row in counts)
    return MixCheck(here, there, statistic, _p_value(statistic, counts, expected))


def _chi_squared(row: Counts, expected: Counts) -> Counts:
    """Pearson's statistic from the second row of the table, `... x slices`; in the first the difference is opposite."""
    found: Counts = ((row - expected[1]) ** 2 * (1 / expected).sum(0)).sum(-1)
    return found


def _p_value(statistic: float, counts: Counts, expected: Counts) -> float:
    if counts.shape[1] == 1:
        return 1.0
    if expected.min() >= MIN_EXPECTED_COUNT:
        half = torch.tensor([counts.shape[1] - 1, statistic], dtype=torch.float64) / 2
        return float(torch.special.gammaincc(half[0], half[1]))
    generator = np.random.default_rng(0)
    smaller = int(np.argmin(counts.sum(1)))
    drawn = generator.multivariate_hypergeometric(counts.sum(0), int(counts[smaller].sum()), RANDOM_TABLES)
    as_large = _chi_squared(drawn, expected[[1 - smaller, smaller]]) >= statistic * (1 - 1e-9)
    return float(as_large.sum() + 1) / (RANDOM_TABLES + 1)


def _percent(share: float) -> str:
    """Whole percent, with two digits of what is less than one and two decimals of what is almost all."""
    if 0 < share < 0.01:
        return f"{100 * share:.2g} %"
    return f"{100 * share:.2f} %" if 0.99 < share < 1 else f"{100 * share:.0f} %"
