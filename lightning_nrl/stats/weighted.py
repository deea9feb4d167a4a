"""A bound for a mix of slices that is not that of the calibration data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from lightning_nrl.errors import ConfigurationError
from lightning_nrl.stats.binomial import check_confidence, limit_at_level, percent_up, show_confidence
from lightning_nrl.stats.slice_bounds import Name, SliceBounds

__all__ = ["WeightedBound", "check_shares", "weighted_bound"]

PLANNED = 0.01
"""The rate of broken samples for which the better of the two constructions is taken; any number would be valid."""


@dataclass(frozen=True)
class WeightedBound:
    """What calibration samples say of data with another mix of slices.

    Attributes:
        shares: the expected share of each slice among samples that were right before.
        confidence: with which the limit holds, in (0, 1).
        rate: the weighted rate of the calibration samples, sum of share * broken / n.
        upper: the limit on the true rate under this mix, in (0, 1].
        construction: `split` or `pooled`; see :func:`weighted_bound`.
    """

    shares: Mapping[Name, float]
    confidence: float
    rate: float
    upper: float
    construction: Literal["split", "pooled"]

    def __str__(self) -> str:
        return (
            f"broken {100 * self.rate:.2f} % when weighted for the mix; with {show_confidence(self.confidence)} "
            f"confidence at most {percent_up(self.upper)} of samples in that mix"
        )


def weighted_bound(slices: SliceBounds, shares: Mapping[Name, float], confidence: float = 0.95) -> WeightedBound:
    r"""An upper limit on the overall rate :math:`\sum_s w_s p_s` under a mix :math:`w` that the user expects.

    Two constructions are valid for fixed shares and sizes:

    * `split`: :math:`\sum_s w_s U_s`, the weighted Clopper-Pearson limits of the slices, each at a level
      :math:`\alpha_s \propto w_s / n_s` of its own. The levels sum to :math:`\alpha` = 1 - confidence, so all limits
      hold together (Bonferroni), and with them the sum. With nothing broken :math:`U_s \approx \log(1/\alpha_s) / n_s`,
      and of all splits this one makes the sum least.
    * `pooled`: with :math:`v_s = w_s / n_s` and :math:`v = \max_s v_s`, the number :math:`S = \sum_s k_s v_s / v` is a
      sum of :math:`N = \sum_s n_s` independent numbers in [0, 1] with the mean :math:`N m = \sum_s w_s p_s / v`.
      Hoeffding (1963, theorem 1) gives :math:`P(S \le x) \le \exp(-N \, \mathrm{kl}(x / N, m))` for :math:`x \le N m`,
      kl the relative entropy of two coins. So the largest m for which this is :math:`\alpha` or more, times
      :math:`N v`, is an upper limit.

    `pooled` does not pay for every slice and wins where many slices are counted about as densely as the mix asks for;
    `split` wins where one slice is much rarer in the calibration data than in the mix. To take the smaller of the two
    would not be valid. The one is taken that is smaller if 1 % of each slice breaks: that depends on shares and sizes
    alone, never on what broke, so the bound holds with the confidence.

    Args:
        slices: the counts of each slice; their own confidence does not matter.
        shares: the expected share of each slice **among samples that are right before**, in [0, 1], sum 1. Must not be
            chosen by looking at what broke.
        confidence: in (0, 1).

    Raises:
        ConfigurationError: the shares are not of the same slices or do not sum to 1, nothing is known of a slice that
            has a share, or the confidence is out of its range.

    Example:
        >>> slices = SliceBounds.of({"light": 2, "dark": 3}, {"light": 890, "dark": 110})
        >>> print(weighted_bound(slices, {"light": 0.31, "dark": 0.69}))
        broken 1.95 % when weighted for the mix; with 95 % confidence at most 5.16 % of samples in that mix
    """
    level = 1 - check_confidence(confidence)
    _check_shares(slices, shares)
    total = math.fsum(shares.values())
    taken = [(shares[name] / total, bound) for name, bound in slices.bounds.items() if shares[name] > 0]
    weights, sizes, broken = ([w for w, _ in taken], [b.n for _, b in taken], [b.broken for _, b in taken])
    planned = [round(PLANNED * n) for n in sizes]
    pools = _pooled(weights, sizes, planned, level) < _split(weights, sizes, planned, level)
    upper = (_pooled if pools else _split)(weights, sizes, broken, level)
    rate = math.fsum(w * k / n for w, n, k in zip(weights, sizes, broken, strict=True))
    return WeightedBound(dict(shares), confidence, rate, upper, "pooled" if pools else "split")


def _split(weights: Sequence[float], sizes: Sequence[int], broken: Sequence[int], level: float) -> float:
    each = [w / n for w, n in zip(weights, sizes, strict=True)]
    limits = (
        w * limit_at_level(k, n, level * v / sum(each)) for w, n, k, v in zip(weights, sizes, broken, each, strict=True)
    )
    return min(1.0, math.fsum(limits))


def _pooled(weights: Sequence[float], sizes: Sequence[int], broken: Sequence[int], level: float) -> float:
    largest = max(w / n for w, n in zip(weights, sizes, strict=True))
    total = sum(sizes)
    seen = math.fsum(k * w / n for w, n, k in zip(weights, sizes, broken, strict=True)) / largest / total
    low, high = min(1.0, seen), 1.0
    while low < (middle := (low + high) / 2) < high:
        if total * _divergence(seen, middle) < -math.log(level):
            low = middle
        else:
            high = middle
    return min(1.0, high * total * largest)


def _divergence(a: float, b: float) -> float:
    """The relative entropy of two coins, of which the first shows heads with probability a <= b."""
    heads = a * math.log(a / b) if a else 0.0
    return heads + (1 - a) * (math.log1p(-a) - math.log1p(-b))


def check_shares(argument: str, shares: Mapping[Name, float]) -> None:
    """Refuses what are no shares of a whole by a `ConfigurationError`."""
    numbers = list(shares.values()) if isinstance(shares, Mapping) else []
    if not all(isinstance(share, Real) and 0 <= share <= 1 for share in numbers) or abs(math.fsum(numbers) - 1) > 1e-6:
        found = f"{dict(shares)}" if isinstance(shares, Mapping) else f"{shares!r}"
        total = f": their sum is {math.fsum(numbers):g}" if all(isinstance(share, Real) for share in numbers) else ""
        raise ConfigurationError(f"`{argument}={found}` are no shares{total}.", "give numbers in [0, 1] that sum to 1.")


def _check_shares(slices: SliceBounds, shares: Mapping[Name, float]) -> None:
    if shares.keys() != slices.bounds.keys():
        raise ConfigurationError(
            f"`shares` has the slices {list(shares)}, the calibration data have {list(slices.bounds)}.",
            "give a share to each slice, 0 to one that is not expected; of a slice without calibration samples "
            "nothing can be said.",
        )
    check_shares("shares", shares)
    if unknown := [name for name, share in shares.items() if share > 0 and slices[name].n == 0]:
        raise ConfigurationError(
            f"`shares`: no calibration sample of {unknown} was right before.",
            "give calibration samples of these slices, or leave them out of the mix.",
        )
