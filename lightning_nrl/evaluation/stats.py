"""Confidence limits and tests for unseen data.

All functions take counts of repaired or broken samples or, with groups, of such groups. Limits
bound the rate of broken samples, even if the data have chosen among several sets of weights. Three
rules tell if a difference is more than chance:

- the verdict on a repair takes the exact `sign_test`;
- the default's training takes `net_repairs_in_standard_errors`, which is cheap and signed;
- the default's choice between rungs takes `variance_of_net_rate`, since the rungs are two results.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from operator import index
from typing import Literal, SupportsIndex, TypeVar

from scipy.special import bdtr, betainccinv
from scipy.stats import hypergeom

from lightning_nrl._utils.json_records import OPTIONAL
from lightning_nrl.errors import ConfigurationError, check_real
from lightning_nrl.evaluation.sample_results import FlipCounts

__all__ = [
    "Bound",
    "Evidence",
    "Selection",
    "binomial_cdf",
    "evidence_of",
    "largest_fall",
    "limit_after",
    "lower_limit",
    "p_worse",
    "pareto_front",
    "sign_test",
    "upper_limit",
]

T = TypeVar("T")
Evidence = Literal["better", "no difference shown", "worse"]
"""Comparison of a model with an earlier model, by a test on repaired and broken samples."""
EVIDENCE_LEVEL = 0.05  # largest p-value of the sign test for a difference to count as shown
CHANCE_STANDARD_ERRORS = 2.0  # smaller differences may be chance
# Share of the error probability for strengths that are accepted from weak to strong. The rest is
# for other weights.
ORDERED_LEVEL_SHARE = 0.8


def upper_limit(broken: int, n: int, confidence: float = 0.95) -> float:
    """Computes the one-sided upper limit of Clopper and Pearson (1934) on a rate, in (0, 1].

    It is the largest rate p with P(Bin(n, p) <= broken) >= 1 - confidence, to 1e-9. It is 1 if
    `broken` equals `n`. Whatever the true rate, the limit is below it in at most a share 1 -
    confidence of draws of n independent samples.

    Args:
        broken: number of broken samples, in [0, n].
        n: number of samples.
        confidence: in (0, 1).

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> round(upper_limit(4, 908), 4)
        0.0101
    """
    return Bound.of(broken, n, confidence).upper


def lower_limit(broken: int, n: int, confidence: float = 0.95) -> float:
    """Computes the one-sided lower limit on a rate, in [0, 1), like :func:`upper_limit`."""
    broken, n = _checked_counts(broken, n)
    return 1 - upper_limit(n - broken, n, confidence)


def interval(k: int, n: int, choices: int = 1) -> tuple[float, float]:
    """Computes a Clopper-Pearson interval for the rate k / n.

    `choices` intervals hold jointly with 90 % confidence.
    """
    confidence = 1 - 0.05 / max(1, choices)
    return lower_limit(k, n, confidence), upper_limit(k, n, confidence)


def limit_at_level(broken: int, n: int, level: float) -> float:
    """Computes `upper_limit` for an error probability, which may be so small that 1 - it is 1."""
    return 1.0 if broken == n else float(betainccinv(broken + 1, n - broken, level))


def binomial_cdf(k: int, n: int, p: float) -> float:
    """Computes the probability of at most k successes in n draws with probability p in (0, 1)."""
    return float(bdtr(min(k, n), n, p))


def p_worse(*, repaired: int, broken: int) -> float:
    """Computes the one-sided p-value of the sign test.

    It is P(Bin(broken + repaired, 1/2) >= broken), and 1 if no sample flipped. So it is small if
    far more samples break than are repaired.

    Example:
        >>> p_worse(repaired=0, broken=5)
        0.03125
    """
    return binomial_cdf(repaired, broken + repaired, 0.5)


def p_of_overlap(n_both: int, n_drawn: int, n_marked: int, n: int) -> float:
    """Computes the one-sided p-value of Fisher's exact test.

    It is the probability that at least `n_both` of `n_drawn` samples, drawn from n, are marked, if
    `n_marked` of the n are. It is 1 if no more are than in proportion.

    Example:
        >>> round(p_of_overlap(3, 3, 4, 8), 4)  # 4 of the 56 ways to draw 3
        0.0714
    """
    if n_both * n <= n_drawn * n_marked:
        return 1.0
    return float(hypergeom.sf(n_both - 1, n, n_marked, n_drawn))


def sign_test(repaired: int, broken: int, choices: int = 1) -> float:
    """Computes the exact two-sided p-value of "a flip is as likely a repair as a break".

    It is 1 if there are no flips. If the data chose among several results, `choices` is their
    number, for a Bonferroni correction.

    Example:
        >>> round(sign_test(3, 20), 4)
        0.0005
    """
    fewer, more = sorted((repaired, broken))
    return min(1.0, 2 * max(1, choices) * p_worse(repaired=fewer, broken=more))


def evidence_of(repaired: int, broken: int, choices: int = 1) -> Evidence:
    """Decides by `sign_test` at a level of 5 % if a model is better or worse.

    Example:
        >>> evidence_of(14, 16), evidence_of(3, 20)
        ('no difference shown', 'worse')
    """
    if sign_test(repaired, broken, choices) > EVIDENCE_LEVEL:
        return "no difference shown"
    return "better" if repaired > broken else "worse"


def largest_fall(*, repaired: int, broken: int, n: int, confidence: float = 0.95) -> float:
    """Computes a one-sided upper limit on the fall of accuracy, (broken - repaired) / n.

    It combines the limits of Clopper and Pearson on both rates ("MOVER", Newcombe 1998; Zou and
    Donner 2008), so that it is `upper_limit` if no sample is repaired.

    Example:
        >>> round(largest_fall(repaired=0, broken=4, n=908), 4)
        0.0101
        >>> round(largest_fall(repaired=4, broken=4, n=908), 4)
        0.0064
    """
    excess = upper_limit(broken, n, confidence) - broken / n
    shortfall = repaired / n - lower_limit(repaired, n, confidence)
    # A sample that breaks cannot be repaired, so the two rates are negatively correlated.
    correlation = math.sqrt(broken * repaired / max(1, (n - broken) * (n - repaired)))
    variance = excess**2 + shortfall**2 + 2 * correlation * excess * shortfall
    return (broken - repaired) / n + math.sqrt(variance)


def net_repairs_in_standard_errors(counts: FlipCounts) -> float:
    """Returns repaired minus broken in units of its standard error.

    It assumes that both are Poisson counts or, with groups, that groups are independent.
    """
    return (counts.repaired - counts.broken) / math.sqrt(max(1, counts.units.squared_net))


def variance_of_net_rate(counts: FlipCounts) -> float:
    """Returns the variance of (repaired - broken) / passed, under the same assumption."""
    return counts.units.squared_net / max(1, counts.passed) ** 2


@dataclass(frozen=True)
class Bound:
    """A limit on the rate at which samples like the calibration data break.

    `broken` of `n` samples that were right before are wrong after. The true rate is at most `upper`
    with `confidence`. If `by_group`, `n` groups had such samples, and one broke in `broken` groups.

    Example:
        >>> print(Bound.of(4, 908))
        broken 4 of 908 (0.44 %); with 95 % confidence at most 1.01 % of such samples
    """

    broken: int
    n: int
    confidence: float
    upper: float
    by_group: bool = field(default=False, kw_only=True, metadata=OPTIONAL)

    @property
    def rate(self) -> float:
        return self.broken / self.n if self.n else math.nan

    @classmethod
    def of(cls, broken: int, n: int, confidence: float = 0.95) -> Bound:
        """Computes the bound of Clopper and Pearson, like :func:`upper_limit`."""
        return cls.at_level(broken, n, 1 - check_confidence(confidence))

    @classmethod
    def at_level(cls, broken: int, n: int, level: float) -> Bound:
        """Computes the bound for the error probability `level`, in (0, 1)."""
        broken, n = _checked_counts(broken, n)
        return cls(broken, n, 1 - level, limit_at_level(broken, n, level))

    def __str__(self) -> str:
        if self.n == 0:
            return "broken 0 of 0; nothing is known of such samples"
        confidence = show_confidence(self.confidence)
        n, units = f"{self.n:,}", "samples"
        if self.by_group:
            n, units = f"{n} groups", "groups"
        return (
            f"broken {self.broken:,} of {n} ({100 * self.rate:.2f} %); "
            f"with {confidence} confidence at most {percent_up(self.upper)} of such {units}"
        )


def pareto_front(
    items: Iterable[T], cost: Callable[[T], float], gain: Callable[[T], float]
) -> tuple[T, ...]:
    """Returns the items for which no other has at most their cost and at least their gain.

    They are sorted by cost. Of equal items the first is returned.
    """
    front: list[T] = []
    for item in sorted(items, key=lambda item: (cost(item), -gain(item))):
        if not front or gain(item) > gain(front[-1]):
            front.append(item)
    return tuple(front)


def least_number(start: int, is_enough: Callable[[int], bool]) -> int:
    """Returns the least number from `start`, at least 1, that is enough; all larger ones are, too.

    Example:
        >>> least_number(1, lambda n: upper_limit(0, n) <= 0.05)
        59
    """
    n = start
    while not is_enough(n):
        n *= 2
    return bisect_left(range(n + 1), True, lo=start, key=is_enough)


def percent_down(rate: float) -> str:
    """Formats a lower limit in percent with two decimals, rounded down."""
    return f"{(Decimal(repr(rate)) * 100).quantize(Decimal('0.01'), ROUND_FLOOR):f} %"


def percent_up(rate: float) -> str:
    """Formats a limit in percent with two decimals or, below 0.1 %, two digits.

    Rounds up, so that the limit stays valid.
    """
    percent = Decimal(repr(rate)) * 100
    places = 1 - percent.adjusted() if 0 < percent < Decimal("0.1") else 2
    return f"{percent.quantize(Decimal(1).scaleb(-places), ROUND_CEILING):f} %"


def show_confidence(confidence: float) -> str:
    """Formats a confidence in percent: 0.9998765 becomes `99.988 %`.

    Rounds the distance from 100 % to two digits.
    """
    return f"{100 - float(f'{100 * (1 - confidence):.2g}'):.10g} %"


def check_confidence(confidence: float) -> float:
    """Returns a number in [0.5, 1). Raises a `ConfigurationError` for any other value."""
    hint = "write 0.95 for 95 %; 0.05 is its error probability."
    check_real("confidence", confidence, "confidence of at least 50 %", hint, least=0.5, below=1)
    return float(confidence)


def _checked_counts(broken: object, n: object) -> tuple[int, int]:
    n_broken, n_samples = _checked_count("broken", broken), _checked_count("n", n)
    if n_broken > n_samples:
        raise ConfigurationError(
            f"`broken={n_broken}` is more than `n={n_samples}`.",
            "`n` is the number of samples that were right before; "
            "`broken` counts only samples among these.",
        )
    return n_broken, n_samples


def _checked_count(argument: str, value: object) -> int:
    # Any whole number will do, such as that of NumPy; a bool is a mistake.
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or index(value) < 0:
        raise ConfigurationError(
            f"`{argument}={value!r}` is no count.", "give a whole number from 0."
        )
    return index(value)


@dataclass(frozen=True)
class Selection:
    """How calibration data took part in the choice of the weights.

    Attributes:
        states: number of sets of weights that the data could have chosen, fixed in advance. 1 if
            they chose nothing.
        ordered: True if 80 % of the error probability is for strengths accepted one by one from
            weak to strong.
        allowed: number, fixed in advance, of calibration samples that the chosen strength and each
            weaker strength may break. None if the weights were not accepted in this order.
    """

    states: int = 1
    ordered: bool = False
    allowed: int | None = None


def limit_after(broken: int, n: int, selection: Selection, confidence: float) -> float:
    """Computes an upper limit on the rate of broken samples, from data that also chose the weights.

    `broken` of the `n` samples that were right before are wrong after. The limit is that of Clopper
    and Pearson for an error probability, which depends on a = 1 - confidence and C =
    `Selection.states` (1 if the data chose nothing):

    - Usually it is a / C (Bonferroni).
    - It is 0.8 a if the chosen strength was accepted in order from weak to strong (Learn then
      Test). Then the limit is computed for `allowed` instead of `broken` samples.
    - It is 0.2 a / C if such an order was fixed but other weights were chosen, for instance
      polished weights.
    """
    level = 1 - confidence
    if selection.allowed is not None:
        return limit_at_level(min(selection.allowed, n), n, level * ORDERED_LEVEL_SHARE)
    if selection.ordered:
        level *= 1 - ORDERED_LEVEL_SHARE
    return limit_at_level(broken, n, level / selection.states)
